"""The frozen base in the CPU's memory, layer by layer on the GPU while it runs: diffusers' group offloading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import set_checkpoint_early_stop

from stages.adapters.fusing import offloads_in_groups


def offload(denoiser: nn.Module, device: str) -> None:
    """Keep the weights in the CPU's memory; each layer comes to the device for its pass, on a GPU ahead of time.

    Single layers, not blocks: checkpoints run parts of a UNet's block again, without the hooks of the block itself.
    """
    on_gpu = device.startswith("cuda")
    alias_weights(denoiser)
    apply_group_offloading(
        denoiser, torch.device(device), torch.device("cpu"), "leaf_level", use_stream=on_gpu, record_stream=on_gpu
    )
    if on_gpu:
        keep_one_prefetched(denoiser)


def alias_weights(denoiser: nn.Module) -> None:
    """Add `Aliases` to each layer; the hooks that are added later load the weights before, and unload them after."""
    for module in denoiser.modules():
        if module._parameters:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(Aliases(), "aliases")


def is_offloaded(denoiser: nn.Module) -> bool:
    return any(map(offloads_in_groups, denoiser.modules()))


def keep_one_prefetched(denoiser: nn.Module) -> None:
    """Send a prefetched layer back if another one runs next.

    diffusers prefetches in the order of the forward pass. In the backward pass the blocks run again in the opposite
    order, so that the last layer of each would leave one of the block after it on the GPU.
    """
    prefetched: list[Any] = []

    def settle(module: Any, args: Any) -> None:
        hook = module._diffusers_hook.get_hook("group_offloading")
        for group in prefetched:
            if group is not hook.group:
                group.offload_()
        prefetched[:] = [] if hook.next_group is None else [hook.next_group]

    for module in denoiser.modules():
        if offloads_in_groups(module):
            module.register_forward_pre_hook(settle)


def offloaded_call(denoiser: nn.Module) -> Callable[..., Any]:
    """A call of an offloaded denoiser whose backward pass finds the weights, and leaves none behind."""

    def call(**arguments: Any) -> Any:
        # Recomputation that stops early would leave the layer that it stops in on the GPU.
        with set_checkpoint_early_stop(False), saved_tensors_hooks(by_reference, lambda unpack: unpack()):
            return denoiser(**arguments)

    return call


class Aliases(ModelHook):
    """While a layer runs, its weights are aliases of the loaded ones, which the end of the pass does not take away.

    Autograd saves a weight itself, and would find it in the CPU's memory in the backward pass.
    """

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.weights = dict(module._parameters)
        for name, weight in self.weights.items():
            if weight is not None:
                alias: Any = weight.detach()
                alias.of = weight
                module._parameters[name] = alias
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module._parameters.update(self.weights)
        return output


def by_reference(value: Tensor) -> Callable[[], Tensor]:
    """Save a weight as a reference, to be loaded in the backward pass, where no checkpoint keeps it for a short time."""
    weight = getattr(value if value._base is None else value._base, "of", None)
    if weight is None:
        return lambda: value
    return partial(load, weight, value.device, (value.shape, value.stride(), value.storage_offset()))


def load(weight: Tensor, device: torch.device, layout: tuple[Any, ...]) -> Tensor:
    return weight.detach().to(device).as_strided(*layout)
