"""The number of threads for a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stages.base.denoiser import denoiser_of

ONE_THREAD_BELOW = 30_000_000  # parameters


def takes_one_thread(pipe: Any) -> bool:
    """Whether the denoiser is small and on the CPU, so that a second thread would mostly wait for the first.

    When another process uses a core, threads wait for each other at every layer and take many times as long.
    """
    parameters = sum(parameter.numel() for parameter in denoiser_of(pipe)[1].parameters())
    return pipe.device.type == "cpu" and parameters < ONE_THREAD_BELOW


@contextmanager
def threads_that_pay(pipe: Any) -> Iterator[None]:
    """Within the context, torch uses one thread for a pipeline that takes one; else the number is unchanged."""
    before = torch.get_num_threads()
    if takes_one_thread(pipe):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
