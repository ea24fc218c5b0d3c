"""What sampling costs and which way it goes, seen from outside an unmodified pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stages.denoiser import bind_inputs


@dataclass(frozen=True)
class Step:
    """What one step of a scheduler began with: its timestep, and the latents `[n, ...]`."""

    timestep: Any
    latents: Tensor


@contextmanager
def replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Within it, an object has another method; afterwards it is as it was."""
    own = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def counted(*denoisers: nn.Module) -> Iterator[list[int]]:
    """Within it, the first item counts the denoisers' evaluations: one for each sample of each batch that one really runs."""
    count = [0]
    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(replaced(denoiser, "forward", _counting(denoiser, count)))
        yield count


def _counting(denoiser: nn.Module, count: list[int]) -> Callable[..., Any]:
    forward = denoiser.forward

    @functools.wraps(forward)  # pipelines and adapters look at its signature
    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += len(next(iter(bind_inputs(denoiser, args, kwargs).values())))
        return forward(*args, **kwargs)

    return counting


@contextmanager
def stepped(pipe: Any, n: int) -> Iterator[list[Step]]:
    """Within it, the list holds every step that the pipeline's scheduler has made for n images.

    A pipeline that hands its scheduler a doubled batch has the images first. Nothing waits for the GPU.
    """
    steps: list[Step] = []
    scheduler, step = pipe.scheduler, pipe.scheduler.step
    signature = inspect.signature(type(scheduler).step)

    @functools.wraps(step)  # pipelines look at its signature
    def seen(*args: Any, **kwargs: Any) -> Any:
        handed = signature.bind(scheduler, *args, **kwargs).arguments
        latents = handed["sample"][:n].clone()
        result = step(*args, **kwargs)
        steps.append(Step(handed["timestep"], latents))
        return result

    with replaced(scheduler, "step", seen):
        yield steps
