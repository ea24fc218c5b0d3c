"""The layout of a pipeline's guided step at each size, by a trial run at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from stages.base.sampling import Condition, Request
from stages.base.size import Size, size_name
from stages.errors import UserError
from stages.generate.finding import recorded_constants
from stages.generate.layout import Layout
from stages.generate.probing import PROBED_SCALES, DoesNotRunError, input_shapes, probe


def layouts_by_size(pipe: Any, layout: Layout, request: Request, examples: Sequence[Condition]) -> dict[str, Layout]:
    """The layout at the size of each example, by the size's name: the denoiser's constant arguments may differ.

    Args:
        layout: that of the first example; request: of its trial run.

    Raises:
        UserError: the pipeline does not make a size, or makes another one in its place.
    """
    layouts = {size_name(examples[0]): layout}
    for example in examples:
        own = replace(request, conditions=[example], seeds=[0])
        if (size := Size.from_columns(example)) is not None:
            check_size(pipe, own, size)
        if example is not examples[0]:
            layouts[size_name(example)] = layout_at(pipe, layout, own, size_name(example))
    return layouts


def check_size(pipe: Any, request: Request, size: Size) -> None:
    """Check that a pipeline makes this size, and does not round it to one that its VAE can divide.

    Raises:
        UserError: it makes another, or fails.
    """
    shapes = input_shapes(pipe, request, PROBED_SCALES[0])
    for key, value in size.columns.items():
        if key == "num_frames":
            rounded = (value - 1) % frames_in_a_latent(pipe) != 0
        else:
            less = [condition | {key: value - 1} for condition in request.conditions]
            rounded = shapes == shapes_or_none(pipe, replace(request, conditions=less))
        if rounded:
            raise UserError(
                f"size {size.name}: {type(pipe).__name__} makes another size in its place, because its VAE cannot divide "
                f"{key}={value}: give a multiple of 8, 16 or 32 (of frames, one more than a multiple of 4 or 8), as its "
                "documentation says"
            )


def shapes_or_none(pipe: Any, request: Request) -> dict[str, torch.Size] | None:
    """The shapes of the denoiser's inputs; None if the pipeline refuses the request."""
    try:
        return input_shapes(pipe, request, PROBED_SCALES[0])
    except DoesNotRunError:
        return None


def frames_in_a_latent(pipe: Any) -> int:
    """How many frames the VAE of a video pipeline makes of each latent after the first; 1 if the pipeline says nothing."""
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    return next((factor for name in names if (factor := getattr(pipe, name, None))), 1)


def layout_at(pipe: Any, layout: Layout, request: Request, size: str) -> Layout:
    """The layout at the size of a request."""
    step = probe(pipe, request, PROBED_SCALES[0])[-1]
    constants = recorded_constants(pipe, layout.conditional_call(step.calls), layout.arguments)
    found = replace(layout, arguments=replace(layout.arguments, constants=constants))
    try:
        found.target(step.received, found.conditional(step.calls, 1))
    except RuntimeError as error:
        raise UserError(
            f"size {size}: {type(pipe).__name__} cannot be recorded at it as at the first size: leave it out"
        ) from error
    return found
