"""Checks that an adapter fits a denoiser: the same sites, widths and numbers of blocks."""

from __future__ import annotations

from torch import nn

from stages.adapters.layers import find_blocks
from stages.adapters.sites import Shape
from stages.errors import UserError

WAY_OUT = "attach it to a base of the architecture it was trained on"


def check_shapes(denoiser: nn.Module, shapes: dict[str, Shape], found: dict[str, Shape]) -> None:
    """
    Args:
        shapes: the adapter's sites; found: those of the denoiser.

    Raises:
        UserError: the two differ.
    """
    for name in [*shapes, *found]:
        if found.get(name) != shapes.get(name):
            expected, actual = format_shape(shapes.get(name)), format_shape(found.get(name))
            raise UserError(
                f"the adapter does not fit this {type(denoiser).__name__}: at {name} it was made for {expected}, "
                f"the base has {actual}: {WAY_OUT}"
            )


def check_blocks(denoiser: nn.Module, shapes: dict[str, Shape], blocks: dict[str, int]) -> None:
    """
    Args:
        shapes: the adapter's sites; blocks: the number of blocks in each list of blocks.

    Raises:
        UserError: the denoiser has more blocks, or fewer.
    """
    for name, count in find_blocks(denoiser, shapes).items():
        if count != blocks.get(name, count):
            raise UserError(
                f"the adapter does not fit this {type(denoiser).__name__}: it was made for {blocks[name]} {name}, "
                f"the base has {count}: {WAY_OUT}"
            )


def format_shape(shape: Shape | None) -> str:
    """Return a site's shape as text for a message."""
    if shape is None:
        return "no site"
    return f"width {shape[0]}" if shape[0] == shape[1] else f"widths {shape[0]} to {shape[1]}"
