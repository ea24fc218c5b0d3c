"""One scale of an adapter in the base's own weights, `W + s B A`: a pass then runs the base's own modules, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from stages.adapters.sites import layer_beneath
from stages.errors import UserError

LowRank = dict[str, tuple[Tensor, Tensor]]  # of layers by name: A [rank, in, ...] and B [out, rank, ...]
FUSABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MARK_SIZE = 64  # elements of a weight, by which it is recognised
ROUNDINGS = 8  # a LoRA that is fused and taken out again leaves some
CHANGED = (
    "{name} was changed while the guidance was fused into it, as by `pipe.fuse_lora()`: undo that change first, or load the "
    "pipeline anew"
)


class FusedWeights:
    """Layers of a base whose weights hold a change, and what they held before.

    The weights are changed in place, so that compiled code, other parts of a pipeline and modules that move between devices go
    on using them. One copy of the layers is kept, from which each change is made anew and the base restored bit for bit.

    Args:
        denoiser: whose layers they are; names: of the layers.
        device: where the copy is kept; by default beside each layer.

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
                "no memory left to keep the base's own weights while a scale is fused: detach the adapter, and keep them elsewhere: "
                'adapter.attach(pipe, backup_device="cpu")'
            ) from error
        self.marks: dict[str, Tensor] = {}

    @torch.no_grad()
    def fuse(self, change: LowRank, strength: float = 1.0) -> None:
        """Have every layer hold `W + strength * B A`, added in float32 and rounded once."""
        for name, layer in self.layers.items():
            weight, (down, up) = layer.weight, change[name]
            delta = (up.flatten(1) @ down.flatten(1)).to(weight.device)
            original = self.originals[name].to(weight.device).flatten(1).float()
            weight.copy_(original.add(delta, alpha=strength).view_as(weight))
            self.marks[name] = start_of(weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Have every layer hold what it held before, bit for bit.

        Raises:
            UserError: something else has changed a layer meanwhile.
        """
        self.check_unchanged()
        self.write_originals()

    @torch.no_grad()
    def write_originals(self) -> None:
        """Have every layer hold what it held before, whatever it holds now."""
        for name, layer in self.layers.items():
            if not layer.weight.is_meta:
                layer.weight.copy_(self.originals[name])
            self.marks.pop(name, None)

    def _merged(self, name: str) -> tuple[str, ...]:
        """The user's LoRAs that peft has added to a layer's weight."""
        return tuple(getattr(self.denoiser.get_submodule(name), "merged_adapters", ()))

    def check_unchanged(self) -> None:
        """
        Raises:
            UserError: a layer does not hold what was put there: restoring it would undo somebody else's change.
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
    """Why no change can be put into the weights of these layers; None where it can."""
    for name in names:
        weight = layer_beneath(denoiser.get_submodule(name)).weight
        if type(weight.data) is not Tensor or weight.dtype not in FUSABLE_DTYPES:
            return f"{name} is quantised"
        if weight.is_meta:
            return f"{name} is offloaded on its own, as by sequential offloading"
    if any(offloads_in_groups(module) for module in denoiser.modules()):
        return "its layers are offloaded in groups, or cast one by one"
    return None


def offloads_in_groups(module: nn.Module) -> bool:
    """Whether diffusers moves or casts the weights of a module by hooks of its own, which may bring back older ones."""
    registry = getattr(module, "_diffusers_hook", None)
    return isinstance(registry, HookRegistry) and any(
        registry.get_hook(name) is not None
        for name in ("group_offloading", "layerwise_casting", "layer_execution_tracker")
    )
