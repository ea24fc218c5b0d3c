"""Layers: the linear and convolutional layers of a denoiser that a LoRA changes. One rule finds them in every family."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.sites import ATTENTION, FEED_FORWARD, Shape, find_projections, layer_beneath
from stages.base import first_line
from stages.denoiser import latent_name, unflatten
from stages.errors import UserError

CONDITIONING, CONVOLUTION = "conditioning", "convolution"
KINDS = (CONDITIONING, ATTENTION, FEED_FORWARD, CONVOLUTION)

Inputs = dict[str, Any]  # a denoiser's arguments, flat


def find_layers(denoiser: nn.Module, wanted: list[str], inputs: Inputs | None = None) -> dict[str, Shape]:
    """Names of the layers that are wanted, in the order of the denoiser, each with its shape.

    Args:
        wanted: `conditioning`: the linear layers that do not see the image; `attention`, `feed_forward`: the linear layers
            inside the modules that `find_sites` finds; `convolution`: every convolution; or patterns of layer names.
        inputs: arguments of one call of the denoiser, by which `conditioning` is found, and layers that do not run are left
            out. Their values do not matter.

    Returns:
        `[in, out]` of a linear layer, `[in, out, height, width, stride, padding]` of a convolution.

    Raises:
        UserError: something that is wanted matches nothing.
    """
    every = adaptable_layers(denoiser)
    sees_image = None if inputs is None else look_at_layers(denoiser, inputs)
    if sees_image is not None:
        every = {name: layer for name, layer in every.items() if name in sees_image}
    if not wanted:
        raise UserError(f"adapter.sites: empty: name some of {', '.join(KINDS)}")
    chosen: set[str] = set()
    for pattern in wanted:
        matching = _matching(denoiser, pattern, every, sees_image)
        if not matching:
            example = f", e.g. {next(iter(every))}" if every else ""
            raise UserError(
                f"adapter.sites: {pattern}: no layer in {type(denoiser).__name__}: name {', '.join(KINDS)} or a pattern of "
                f"its {len(every)} linear and convolutional layers{example}"
            )
        chosen |= matching
    return {name: shape_of(layer) for name, layer in every.items() if name in chosen}


def _matching(denoiser: nn.Module, wanted: str, every: dict[str, Any], sees_image: dict[str, bool] | None) -> set[str]:
    if wanted == CONDITIONING:
        if sees_image is None:
            raise UserError(f"adapter.sites: {CONDITIONING}: found by running the denoiser, and no inputs are known")
        return {name for name, layer in every.items() if isinstance(layer, nn.Linear) and not sees_image[name]}
    if wanted in (ATTENTION, FEED_FORWARD):
        return set(find_projections(denoiser, [wanted]))
    if wanted == CONVOLUTION:
        return {name for name, layer in every.items() if isinstance(layer, nn.Conv2d)}
    return {name for name in every if fnmatchcase(name, wanted)}


def adaptable_layers(denoiser: nn.Module) -> dict[str, Any]:
    """The base's own linear and convolutional layers by name, those beneath a LoRA that the user loaded too."""
    named = {name: layer_beneath(module) for name, module in denoiser.named_modules() if ".lora_" not in name}
    return {name: layer for name, layer in named.items() if not name.endswith(".base_layer") and is_adaptable(layer)}


def is_adaptable(layer: Any) -> bool:
    """Whether a LoRA can change a layer: a linear layer, or a plain convolution with square strides."""
    if not isinstance(layer, nn.Conv2d):
        return isinstance(layer, nn.Linear)
    square = len({*layer.stride}) == 1 and not isinstance(layer.padding, str) and len({*layer.padding}) == 1
    return square and layer.groups == 1 and {*layer.dilation} == {1} and layer.padding_mode == "zeros"


def shape_of(layer: Any) -> Shape:
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    return [layer.in_channels, layer.out_channels, *layer.kernel_size, layer.stride[0], layer.padding[0]]


def look_at_layers(denoiser: nn.Module, inputs: Inputs) -> dict[str, bool]:
    """Whether each linear and convolutional layer that runs sees the image.

    The denoiser runs once on the meta device, with a gradient asked for the latent alone: a layer whose input asks for no
    gradient does not see the image. A layer that is not given one row for each sample, or several, is left out, because scales
    of one batch could not be told apart there.

    Raises:
        UserError: the denoiser cannot run there.
    """
    model: Any = denoiser
    latent = latent_name(denoiser)
    with torch.device("meta"):
        copy = type(model).from_config(dict(model.config))
    copy.eval().requires_grad_(False)
    given = {name: _on_meta(value) for name, value in inputs.items()}
    rows, sees_image, left_out = len(given[latent]), dict[str, bool](), set[str]()

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sees_image[name] = sees_image.get(name, False) or args[0].requires_grad
            if len(args[0]) % rows:
                left_out.add(name)

        return look

    for name, module in copy.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(watch(name))
    given[latent] = given[latent].requires_grad_() * 1  # no leaf, because some denoisers change it in place
    try:
        with torch.enable_grad():
            copy(**unflatten(given))
    except Exception as error:  # whatever a denoiser's own code raises
        raise UserError(
            f"adapter.sites: {type(denoiser).__name__} does not run without data, so that no layer can be looked at: "
            f"{first_line(error)}"
        ) from error
    return {name: sees for name, sees in sees_image.items() if name not in left_out}


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_like(value, device="meta", dtype=torch.float32 if value.is_floating_point() else value.dtype)


def find_blocks(denoiser: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The lists of blocks that layers of these names lie in, each with the number of its blocks: how deep a base is."""
    parents = {parent for name in names for parent in accumulate(name.split(".")[:-1], "{}.{}".format)}
    lists = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: len(blocks) for name, blocks in lists.items() if name in parents}
