"""What sampling costs and which way it goes, seen from outside an unmodified pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stages.base.denoiser import samples_in
from stages.base.patching import patched


@dataclass(frozen=True)
class SchedulerStep:
    """What one step of a scheduler began with: its timestep, and the latents `[n, ...]`."""

    timestep: Any
    latents: Tensor


@contextmanager
def counted(*denoisers: nn.Module) -> Iterator[list[int]]:
    """Within it, the first item counts the denoisers' evaluations: one for each sample of each batch that one really runs."""
    count = [0]

    def counting(forward: Any, denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count[0] += samples_in(denoiser, args, kwargs)
        return forward(*args, **kwargs)

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(patched(denoiser, "forward", counting))
        yield count


@contextmanager
def stepped(pipe: Any, n: int) -> Iterator[list[SchedulerStep]]:
    """Within it, the list holds every step that the pipeline's scheduler has made for n images.

    A pipeline that hands its scheduler a doubled batch has the images first. Nothing waits for the GPU.
    """
    steps: list[SchedulerStep] = []
    signature = inspect.signature(type(pipe.scheduler).step)

    def seen(step: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        handed = signature.bind(scheduler, *args, **kwargs).arguments
        latents = handed["sample"][:n].clone()
        result = step(*args, **kwargs)
        steps.append(SchedulerStep(handed["timestep"], latents))
        return result

    with patched(pipe.scheduler, "step", seen):
        yield steps
