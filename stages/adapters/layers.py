"""The linear and convolutional layers that a LoRA changes. One structural rule finds them in every family."""

from __future__ import annotations

from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from torch import nn

from stages.adapters.inputs import Inputs
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.sites import (
    ATTENTION,
    CONVOLUTIONS,
    FEED_FORWARD,
    Shape,
    find_projections,
    layer_beneath,
    width_in,
    width_out,
)
from stages.adapters.spots import TrialFacts
from stages.adapters.trial_forward import run_trial
from stages.errors import UserError

CONDITIONING, CONVOLUTION = "conditioning", "convolution"
KINDS = (CONDITIONING, ATTENTION, FEED_FORWARD, CONVOLUTION)
FORWARDS = {kind.forward for kind in CONVOLUTIONS}


def find_layers(denoiser: nn.Module, wanted: list[str], seen: dict[str, TrialFacts] | None = None) -> dict[str, Shape]:
    """Find the requested layers, in the order of the denoiser, each with its shape.

    Args:
        wanted: `conditioning`: the linear layers that do not see the image; `attention`, `feed_forward`: the linear
            layers inside the modules that `find_sites` finds; `convolution`: every convolution; or patterns of layer
            names. A kind that the denoiser lacks is left out beside one that it has.
        seen: what a trial forward showed of the layers: it finds `conditioning`, and leaves out layers that do not run,
            or whose rows cannot be assigned to samples.

    Returns:
        Shapes by name, as `shape_of` returns them.

    Raises:
        UserError: a pattern matches nothing, or the denoiser has none of the kinds.
    """
    every = adaptable_layers(denoiser)
    if seen is not None:
        every = {name: layer for name, layer in every.items() if name in seen and seen[name].spot is not None}
    if not wanted:
        raise UserError(f"adapter.sites: empty: name some of {', '.join(KINDS)}")
    matching = {pattern: _matching(denoiser, pattern, every, seen) for pattern in wanted}
    some = any(matching.values())
    for pattern in wanted:
        if not matching[pattern] and not (some and pattern in KINDS):
            example = f", e.g. {next(iter(every))}" if every else ""
            raise UserError(
                f"adapter.sites: {pattern}: no layer in {type(denoiser).__name__}: name {', '.join(KINDS)} or a "
                f"pattern of its {len(every)} linear and convolutional layers{example}"
            )
    chosen = set().union(*matching.values())
    return {name: shape_of(layer) for name, layer in every.items() if name in chosen}


def _matching(denoiser: nn.Module, wanted: str, every: dict[str, Any], seen: dict[str, TrialFacts] | None) -> set[str]:
    if wanted == CONDITIONING:
        if seen is None:
            raise UserError(f"adapter.sites: {CONDITIONING}: found by running the denoiser, and no inputs are known")
        return {name for name, layer in every.items() if isinstance(layer, nn.Linear) and not seen[name].sees_image}
    if wanted in (ATTENTION, FEED_FORWARD):
        return _inside(denoiser, wanted, every)
    if wanted == CONVOLUTION:
        return {name for name, layer in every.items() if isinstance(layer, CONVOLUTIONS)}
    return {name for name in every if fnmatchcase(name, wanted)}


def _inside(denoiser: nn.Module, kind: str, every: Container[str]) -> set[str]:
    try:
        return {name for name in find_projections(denoiser, [kind]) if name in every}
    except UserError:  # no site of the kind
        return set()


def run_trial_of_layers(denoiser: nn.Module, inputs: Inputs) -> dict[str, TrialFacts]:
    """Run a trial forward on every layer that a LoRA can change; see `trial_forward.run_trial`."""
    widths = {name: shape_of(layer) for name, layer in adaptable_layers(denoiser).items()}
    return run_trial(denoiser, widths, inputs, AdapterMetadata(conditions={}, scale_range=[1.0, 1.0]))


def adaptable_layers(denoiser: nn.Module) -> dict[str, Any]:
    """Return the base's own linear and convolutional layers by name, also those beneath a loaded LoRA."""
    named = {name: layer_beneath(module) for name, module in denoiser.named_modules() if ".lora_" not in name}
    return {name: layer for name, layer in named.items() if not name.endswith(".base_layer") and is_adaptable(layer)}


def is_adaptable(layer: Any) -> bool:
    """Whether a LoRA can change a layer: a linear layer, or a plain convolution.

    The patch embedding of a video is left out: other tools load no LoRA for it.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return isinstance(layer, nn.Linear)
    plain = type(layer).forward in FORWARDS and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    is_patch_embedding = isinstance(layer, nn.Conv3d) and {*layer.stride} != {1}
    return plain and layer.groups == 1 and {*layer.dilation} == {1} and not is_patch_embedding


def shape_of(layer: Any) -> Shape:
    """Return `[in, out]` of a linear layer; for a convolution followed by kernel, strides and paddings of each axis.

    A two-dimensional convolution with equal strides and equal paddings has one each: `[in, out, height, width, stride,
    padding]`.
    """
    shape = [width_in(layer), width_out(layer)]
    if isinstance(layer, nn.Linear):
        return shape
    is_regular = len(layer.kernel_size) == 2 and len({*layer.stride}) == 1 and len({*layer.padding}) == 1
    rest = (*layer.stride[:1], *layer.padding[:1]) if is_regular else (*layer.stride, *layer.padding)
    return [*shape, *layer.kernel_size, *rest]


def find_blocks(denoiser: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks in each list of blocks that contains these layers: the depth of the base."""
    parents = {parent for name in names for parent in accumulate(name.split(".")[:-1], "{}.{}".format)}
    lists = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: len(blocks) for name, blocks in lists.items() if name in parents}
