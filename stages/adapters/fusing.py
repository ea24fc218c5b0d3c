"""Fusing one scale into the base's weights, `W + s B A`: a pass then runs the base's own modules only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from stages.adapters.sites import layer_beneath
from stages.errors import UserError

LowRank = dict[str, tuple[Tensor, Tensor]]  # by layer: A [rank, in, ...] and B [out, rank, ...]
FUSABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MARK_SIZE = 64  # leading elements of a weight that show whether it changed
ROUNDINGS = 8  # fusing and unfusing a LoRA leaves a few
CHANGED = (
    "{name} was changed while the guidance was fused into it, as by `pipe.fuse_lora()`: undo that change first, "
    "or load the pipeline again"
)


class FusedWeights:
    """Layers of a base with a fused change, and a copy of their original weights.

    Weights change in place, so compiled code, other pipelines and offloading keep using the same tensors. Each change
    starts from the copy, which also restores the base bit for bit.

    Args:
        names: of the layers in the denoiser.
        device: where the copy is kept; by default on each layer's device.

    Raises:
        UserError: there is no memory for the copy.
    """

    def __init__(self, denoiser: nn.Module, names: list[str], device: str | torch.device | None = None) -> None:
        self.denoiser = denoiser
        self.layers: dict[str, Any] = {name: layer_beneath(denoiser.get_submodule(name)) for name in names}
        self.merged = {name: self._merged(name) for name in names}
        try:
            self.originals = {
                name: layer.weight.detach().to(device or layer.weight.device, copy=True)
                for name, layer in self.layers.items()
            }
        except torch.OutOfMemoryError as error:
            raise UserError(
                "no memory left to keep the base's own weights while a scale is fused: detach the adapter, and keep "
                'them on another device: adapter.attach(pipe, backup_device="cpu")'
            ) from error
        self.marks: dict[str, Tensor] = {}

    @torch.no_grad()
    def fuse(self, change: LowRank, strength: float = 1.0) -> None:
        """Set every layer's weight to `W + strength * B A`, added in float32 and rounded once."""
        for name, layer in self.layers.items():
            weight, (down, up) = layer.weight, change[name]
            delta = (up.flatten(1) @ down.flatten(1)).to(weight.device)
            original = self.originals[name].to(weight.device).flatten(1).float()
            weight.copy_(original.add(delta, alpha=strength).view_as(weight))
            self.marks[name] = start_of(weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore every layer bit for bit.

        Raises:
            UserError: other code has changed a layer meanwhile.
        """
        self.check_unchanged()
        self.write_originals()

    @torch.no_grad()
    def write_originals(self) -> None:
        """Restore every layer without a check."""
        for name, layer in self.layers.items():
            if not layer.weight.is_meta:
                layer.weight.copy_(self.originals[name])
            self.marks.pop(name, None)

    def _merged(self, name: str) -> tuple[str, ...]:
        """Return the user's LoRAs that peft has merged into a layer's weight."""
        return tuple(getattr(self.denoiser.get_submodule(name), "merged_adapters", ()))

    def check_unchanged(self) -> None:
        """
        Raises:
            UserError: a weight is not as it was fused: restoring it would undo another change.
        """
        for name in self.marks:
            if self._merged(name) != self.merged[name]:
                raise UserError(CHANGED.format(name=name))
        weights = {name: self.layers[name].weight for name in self.marks}
        held = {name: start_of(weight) for name, weight in weights.items() if not weight.is_meta}
        if not held:
            return
        device = next(iter(held.values())).device
        errors, sizes = (
            torch.stack([values.abs().max().to(device) for values in tensors]).tolist()
            for tensors in ([value - self.marks[name].to(value.device) for name, value in held.items()], held.values())
        )
        for name, error, size in zip(held, errors, sizes, strict=True):
            if error > ROUNDINGS * torch.finfo(weights[name].dtype).eps * size:
                raise UserError(CHANGED.format(name=name))


def start_of(weight: Tensor) -> Tensor:
    return weight.detach().flatten()[:MARK_SIZE].to(torch.float32, copy=True)


def why_not_fusable(denoiser: nn.Module, names: list[str]) -> str | None:
    """Return why a change cannot be fused into these layers; None if it can."""
    for name in names:
        weight = layer_beneath(denoiser.get_submodule(name)).weight
        # Some weights of a class of their own are quantised only in their first pass.
        plain = type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
        if not plain or weight.dtype not in FUSABLE_DTYPES:
            return f"{name} is quantised"
        if weight.is_meta:
            return f"{name} is offloaded on its own, as by sequential offloading"
    if any(offloads_in_groups(module) for module in denoiser.modules()):
        return "its layers are offloaded in groups, or cast one by one"
    return None


def offloads_in_groups(module: nn.Module) -> bool:
    """Whether diffusers' hooks move or cast a module's weights, and may bring back old values."""
    registry = getattr(module, "_diffusers_hook", None)
    return isinstance(registry, HookRegistry) and any(
        registry.get_hook(name) is not None
        for name in ("group_offloading", "layerwise_casting", "layer_execution_tracker")
    )
