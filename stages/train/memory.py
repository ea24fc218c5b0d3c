"""The memory of a training step, by a model: the step runs on fake tensors, which have storages without memory.

The model counts the bytes of the live ones. It leaves out the workspaces of kernels (cuDNN, cuBLAS), the GPU's context,
and the allocator's reserve.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from stages.train.defaults import RunConfig
from stages.train.offloading import alias_weights, offloaded_call
from stages.train.optimization import Optimization
from stages.train.quantization import INT4_GROUP, replace_linears
from stages.train.student import Student


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within the context, for as long as they live.

    Torch's own `MemTracker` rejects frozen parameters.

    Attributes:
        live, peak: bytes now, and their maximum; `peak` may be reset at the start of a phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        self.count(tree_leaves(output))
        return output

    def count(self, tensors: Any) -> int:
        """Count tensors that were made earlier, too; return the bytes of those that were not yet counted."""
        before = self.live
        for storage in chain.from_iterable(get_untyped_storages(t) for t in tensors if isinstance(t, Tensor)):
            if storage not in self._counted:
                self._counted[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return self.live - before

    def leave_out(self, tensors: Any) -> None:
        """Never count these tensors, nor views of them."""
        for storage in chain.from_iterable(map(get_untyped_storages, tensors)):
            self._counted[storage] = True

    def _forget(self, size: int) -> None:
        self.live -= size


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make modules in this precision within the context, because a fake module cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def fake_tensors(n: int) -> Iterator[None]:
    """Make fake tensors within the context; those of up to n numbers, such as scales, keep values that they are given."""
    before, fake_tensor.CONSTANT_NUMEL_LIMIT = fake_tensor.CONSTANT_NUMEL_LIMIT, n
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before


def modellable(config: RunConfig) -> RunConfig:
    """The options as the model runs them: bf16 in place of fp16, whose loss scale reads values."""
    return replace(config, mixed_precision="bf16") if config.mixed_precision == "fp16" else config


def step_bytes(student: Student, config: RunConfig, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """The bytes of a step's parts, and its `peak`, for a student of fake tensors.

    `base` is what stays on the device; `activations` is what the forward pass keeps for the backward pass, and `blocks`
    splits it by block. The base must be in the run's precision, and its linear layers as `hold` leaves them.
    """
    denoiser, adapter, memory = student.denoiser, student.adapter, LiveBytes()
    optimization = Optimization(adapter, config, "cpu")
    if config.mixed_precision != "no":
        norms_in_fp32(denoiser)
    weights, prefetched = [*denoiser.parameters(), *denoiser.buffers()], 0
    if config.enable_group_offload:
        memory.leave_out(weights)
        prefetched = load_while_running(denoiser)
        student.call = offloaded_call(denoiser)
    parts: dict[str, Any] = {
        "base": memory.count(weights),
        "adapter": memory.count(chain(adapter.parameters(), adapter.buffers())),
        "average": memory.count(optimization.average.shadow_params) if optimization.average is not None else 0,
    }
    with memory:
        parts["optimizer"] = optimizer_state(optimization, memory)
        at_rest = memory.peak = memory.live
        with kept_by_blocks(denoiser, memory) as blocks:
            value = loss()
        parts["activations"] = memory.live - at_rest
        optimization.backward(value)
        del value
        parts["gradients"] = sum(p.grad.nbytes for p in adapter.parameters() if p.grad is not None)
        optimization.step()
    return parts | {"blocks": blocks, "peak": memory.peak + prefetched}


def norms_in_fp32(denoiser: nn.Module) -> None:
    """Run norms in fp32, as autocast does on a GPU but not on the CPU, where the model runs."""
    for module in denoiser.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            module.register_forward_pre_hook(lambda _, args: args[0].float())


def optimizer_state(optimization: Optimization, memory: LiveBytes) -> int:
    """Make the optimizer's state, as the first step does; return its bytes."""
    before = memory.live
    for parameter in optimization.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimization.step()
    return memory.live - before


@contextmanager
def kept_by_blocks(denoiser: nn.Module, memory: LiveBytes) -> Iterator[dict[str, int]]:
    """Collect the bytes that each block's forward pass leaves alive, by the block's name."""
    kept: dict[str, int] = {}
    handles = []
    for name, block in blocks_of(denoiser):

        def enter(*_: Any, name: str = name) -> None:
            kept[name] = -memory.live

        def leave(*_: Any, name: str = name) -> None:
            kept[name] += memory.live

        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    yield kept
    for handle in handles:
        handle.remove()


def blocks_of(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the denoiser's own modules, with the members of its lists of blocks."""
    for name, module in denoiser.named_children():
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(module))
        else:
            yield name, module


# The base, held otherwise


def load_while_running(denoiser: nn.Module) -> int:
    """Load each layer's weights for its own pass, as an offloaded base does; return the bytes of the largest layer.

    A GPU loads one layer ahead.
    """
    alias_weights(denoiser)
    for module in denoiser.modules():
        if module._parameters:
            module.register_forward_pre_hook(LoadOwn())
            module.register_forward_hook(unload_own)
    return max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in denoiser.modules())


class LoadOwn:
    """A hook that copies a module's own weights."""

    def __call__(self, module: Any, args: Any) -> None:
        module.unloaded = {name: p.data for name, p in module._parameters.items() if p is not None}
        for name, data in module.unloaded.items():
            module._parameters[name].data = data.clone()


def unload_own(module: Any, args: Any, output: Any) -> None:
    for name, data in module.unloaded.items():
        module._parameters[name].data = data


def hold(denoiser: nn.Module, kind: str) -> None:
    """Replace linear layers by some that take the bytes of quantised ones, which refuse fake tensors."""
    if kind != "none":
        replace_linears(denoiser, lambda linear: Quantised(linear, kind))


class Quantised(nn.Linear):
    """Takes the memory of a linear layer in 8 or 4 bits."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # torchao's operations in 8 bits leave the weight as they have converted it to the backward pass.
        self.keeps = kind in ("int8", "fp8")
        self.dtype, size = linear.weight.dtype, quantised_bytes(linear, kind)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return Product.apply(input.to(self.dtype), self.bias, shape, self.keeps)


def quantised_bytes(linear: nn.Linear, kind: str) -> int:
    width, height = linear.in_features, linear.out_features
    if kind == "int8":
        return width * height + height * linear.weight.element_size()
    if kind == "fp8":
        return width * height + height * 4
    if kind == "nf4":  # 64 weights share a scale of one byte, and 256 of these one of four
        scales = -(-width * height // 64)
        return -(-width * height // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256)
    width, height = -(-width // 1024) * 1024, -(-height // 8) * 8  # the kernel pads
    return width * height // 2 + height * (width // INT4_GROUP) * 4


class Product(torch.autograd.Function):
    """A product with a weight that is dequantised for it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, shape: tuple[int, int], keeps: bool) -> Tensor:
        ctx.shape = shape
        weight = input.new_empty(shape)
        if keeps:
            ctx.save_for_backward(weight)
        return functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        weight = saved[0] if saved else gradient.new_empty(ctx.shape)
        return gradient.to(weight) @ weight, None, None, None
