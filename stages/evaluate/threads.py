"""How many threads a pipeline takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stages.base.denoiser import denoiser_of

ONE_THREAD_BELOW = 30_000_000  # parameters


def takes_one_thread(pipe: Any) -> bool:
    """Whether the denoiser is a small one on the CPU, at whose matrices a second thread mostly waits for the first.

    Where something else takes a core, threads wait for each other at every layer, and take many times as long together.
    """
    parameters = sum(parameter.numel() for parameter in denoiser_of(pipe)[1].parameters())
    return pipe.device.type == "cpu" and parameters < ONE_THREAD_BELOW


@contextmanager
def threads_that_pay(pipe: Any) -> Iterator[None]:
    """Within it, a pipeline that takes one thread has one; any other keeps its own."""
    before = torch.get_num_threads()
    if takes_one_thread(pipe):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
