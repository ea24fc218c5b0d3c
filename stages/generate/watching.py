"""Watching an unmodified pipeline at two points: at its denoiser, and at `scheduler.step`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stages.denoiser import bind_inputs, denoiser_of, latent_name
from stages.errors import UserError

Inputs = dict[str, Any]


@contextmanager
def watched(pipe: Any, see_step: Callable[[list[Inputs], Tensor, Any], None]) -> Iterator[None]:
    """Within it, `see_step` gets the denoiser's calls, the prediction and the timestep of every step that `pipe` makes."""
    _, denoiser = denoiser_of(pipe)
    name, scheduler, step = latent_name(denoiser), pipe.scheduler, pipe.scheduler.step
    signature = inspect.signature(type(scheduler).step)
    calls: list[Inputs] = []

    def see_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = bind_inputs(module, args, kwargs)
        inputs.pop("return_dict", None)
        inputs["timestep"] = _per_sample(inputs["timestep"], inputs[name])
        calls.append(inputs)

    @functools.wraps(step)  # pipelines look at its signature
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(scheduler, *args, **kwargs).arguments
        see_step(list(calls), given["model_output"], given["timestep"])
        calls.clear()
        return step(*args, **kwargs)

    handle = denoiser.register_forward_pre_hook(see_call, with_kwargs=True)
    scheduler.step = watched_step
    try:
        yield
    finally:
        handle.remove()
        del scheduler.step


def _per_sample(timestep: Any, latent: Tensor) -> Tensor:
    """A call's timestep for each of its samples `[n]`."""
    value = torch.as_tensor(timestep, device=latent.device)
    if value.ndim > 1:
        raise UserError("this teacher gives its denoiser a timestep per token: such pipelines cannot be recorded")
    return (value.float() if value.is_floating_point() else value).expand(len(latent))
