"""Training steps of a denoiser of some shape with random weights, for tests that compare their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.train.objective import squared_error
from stages.train.student import Student
from tests.benchmarks.training_memory import records
from tests.support.real_shapes import Shape, arguments_of, inputs_of, metadata_of


def gradients(
    shape: Shape, checkpointed: bool, steps: int, prepare: Callable[[nn.Module, str], None] | None = None
) -> list[Tensor]:
    """Return the gradients of an adapter after some passes, which add up.

    Args:
        prepare: called with the denoiser and the device, before the adapter is made.
    """
    torch.manual_seed(0)
    denoiser = shape.build().eval().requires_grad_(False)
    inputs = inputs_of(shape, denoiser, 1)
    if prepare is not None:
        prepare(denoiser, "cpu")
    adapter = GuidanceAdapter.for_denoiser(AdapterConfig(), denoiser, metadata_of(shape), inputs)
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    student = Student(denoiser, adapter, arguments_of(shape, denoiser), [shape.latent[0]])
    if checkpointed:
        student.checkpoint_gradients()
    batch = records(shape, 2)
    for _ in range(steps):
        squared_error(student.predict(batch), batch.target).mean().backward()
    return [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
