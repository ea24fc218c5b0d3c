"""The memory of a training step at a real denoiser's shape: measured on a GPU, and by a model.

python -m tests.benchmarks.training_memory sdxl|sd15|dit_xl_2_256|tiny_sdxl [variant] [none|int8 ...]

The step trains on one record, with the base in bf16 and gradient checkpointing, once with the plain base and once with
its linear layers in 8 bits. Weights are random: memory does not depend on them. Prints one JSON object, in bytes; exit
status 1 if a peak is above its goal.

The model runs the same step on fake tensors, which have storages without memory, and counts the bytes of the live ones.
It leaves out the workspaces of kernels (cuDNN, cuBLAS), the GPU's context, and the allocator's reserve.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.train.base import PRECISION
from stages.train.batch import Batch
from stages.train.config import QUANTIZATIONS, TrainConfig
from stages.train.objective import squared_error
from stages.train.optimization import Optimization
from stages.train.quantization import quantize
from stages.train.student import Student
from tests.benchmarks.tiny_shapes import shape_named
from tests.support.real_shapes import Shape, arguments_of, conditions_of, inputs_of, metadata_of

GB = 10**9
GOALS = {("sdxl", "lora"): {"none": 12 * GB, "int8": 8 * GB}}
STEPS = 3


@dataclass(frozen=True)
class Setup:
    """A denoiser's shape, and the options of training that affect its memory.

    The loss scale of fp16 cannot be modelled.
    """

    shape: Shape
    variant: str = "lora"
    quantization: str = "none"
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = True


class Training:
    """A student with random weights, an optimizer and a batch of made-up records, one by default."""

    def __init__(self, setup: Setup, device: str, batch_size: int = 1) -> None:
        precision = PRECISION.get(setup.mixed_precision, torch.float32)
        with torch.device(device), default_dtype(precision):
            denoiser = setup.shape.build()
        denoiser.eval().requires_grad_(False)
        if setup.quantization == "int8":
            quantize(denoiser, setup.quantization)
        inputs = inputs_of(setup.shape, denoiser, 1)
        adapter = GuidanceAdapter.for_denoiser(AdapterConfig(setup.variant), denoiser, metadata_of(setup.shape), inputs)
        if device != "cpu":  # a fake module cannot be moved
            adapter.to(device)
        self.student = Student(
            denoiser,
            adapter,
            arguments_of(setup.shape, denoiser),
            [setup.shape.latent[0]],
            setup.mixed_precision,
        )
        if setup.gradient_checkpointing:
            self.student.checkpoint_gradients()
        self.optimization = Optimization(adapter, TrainConfig(mixed_precision=setup.mixed_precision), device)
        self.batch = records(setup.shape, batch_size).to(device, precision)

    def loss(self) -> Tensor:
        return squared_error(self.student.predict(self.batch), self.batch.target).mean()

    def step(self) -> None:
        self.optimization.backward(self.loss())
        self.optimization.step()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make modules in this precision within the context, because a fake module cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def records(shape: Shape, n: int) -> Batch:
    latent, target = torch.randn(n, *shape.latent), torch.randn(n, *shape.latent)
    cond = conditions_of(shape, n, torch.device("cpu"), torch.float32)
    return Batch(
        latent, torch.tensor([500] * n), target, torch.tensor([2.0] * n), cond
    )  # `torch.tensor` keeps its values on a fake tensor


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

    def _forget(self, size: int) -> None:
        self.live -= size


def modelled(setup: Setup) -> dict[str, Any]:
    """Return the bytes of a step's parts and its peak.

    `activations` is what the forward pass keeps for the backward pass; `blocks` splits it by block.
    """
    memory = LiveBytes()
    with FakeTensorMode():
        training = Training(setup, "cpu")
        denoiser, adapter = training.student.denoiser, training.student.adapter
        if setup.mixed_precision != "no":
            norms_in_fp32(denoiser)
        parts: dict[str, Any] = {
            "base": memory.count(chain(denoiser.parameters(), denoiser.buffers())),
            "adapter": memory.count(chain(adapter.parameters(), adapter.buffers())),
        }
        with memory:
            parts["optimizer"] = optimizer_state(training, memory)
            at_rest = memory.peak = memory.live
            with kept_by_blocks(denoiser, memory) as blocks:
                loss = training.loss()
            parts["activations"] = memory.live - at_rest
            training.optimization.backward(loss)
            del loss
            parts["gradients"] = sum(parameter.grad.nbytes for parameter in adapter.parameters())
            training.optimization.step()
    return parts | {"blocks": blocks, "peak": memory.peak}


def norms_in_fp32(denoiser: nn.Module) -> None:
    """Run norms in fp32, as autocast does on a GPU but not on the CPU, where the model runs."""
    for module in denoiser.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            module.register_forward_pre_hook(lambda _, args: args[0].float())


def optimizer_state(training: Training, memory: LiveBytes) -> int:
    """Make the optimizer's state, as the first step does; return its bytes."""
    before = memory.live
    for parameter in training.student.adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimization.step()
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


def measured(setup: Setup) -> int:
    """Return the peak bytes that a few steps allocate on the GPU."""
    gc.collect()
    training = Training(setup, "cuda")
    training.step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        training.step()
    return torch.cuda.max_memory_allocated()


def goal_of(setup: Setup) -> int | None:
    return GOALS.get((setup.shape.config, setup.variant), {}).get(setup.quantization)


def row(setup: Setup) -> dict[str, Any]:
    """Return a row with `peak`, measured if possible, and its `goal`, or None."""
    model = modelled(setup)
    peak = measured(setup) if torch.cuda.is_available() else model["peak"]
    return {"quantization": setup.quantization, "peak": peak, "goal": goal_of(setup), "model": model}


def main(config: str, variant: str = "lora", *quantizations: str) -> None:
    shape = shape_named(config)
    rows = [row(Setup(shape, variant, quantization)) for quantization in quantizations or QUANTIZATIONS]
    info = {
        "shape": shape.title,
        "variant": variant,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: the peak is the model's",
        "rows": rows,
    }
    print(json.dumps(info, indent=2))
    if any(row["goal"] is not None and row["peak"] > row["goal"] for row in rows):
        sys.exit(f"{shape.title}, {variant}: the peak is above its goal")


if __name__ == "__main__":
    main(*sys.argv[1:])
