"""Watching an unmodified pipeline at two points: at its denoiser, and at `scheduler.step`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.denoiser import bind_inputs, denoiser_of, latent_name
from stages.errors import UserError

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: what it was given, by its own names, and what it predicted `[rows, ...]`."""

    inputs: Inputs
    prediction: Tensor


@contextmanager
def watched(
    pipe: Any,
    see_step: Callable[[list[Call], Tensor, Any], None],
    see_latents: Callable[[Tensor], None] = lambda latents: None,
) -> Iterator[None]:
    """Within it, `see_step` gets the denoiser's calls, the prediction and the timestep of every step that `pipe` makes.

    `see_latents` gets the latents that the scheduler made of them.
    """
    _, denoiser = denoiser_of(pipe)
    name, scheduler, step = latent_name(denoiser), pipe.scheduler, pipe.scheduler.step
    signature = inspect.signature(type(scheduler).step)
    given: list[Inputs] = []
    calls: list[Call] = []

    def see_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = bind_inputs(module, args, kwargs)  # before the call, which may change dictionaries it was given
        inputs.pop("return_dict", None)
        inputs["timestep"] = _per_sample(inputs["timestep"], inputs[name])
        given.append(inputs)

    def see_prediction(module: Any, args: tuple[Any, ...], output: Any) -> None:
        prediction = output[0] if isinstance(output, tuple) else output.sample
        calls.append(Call(given.pop(), prediction.clone()))  # pipelines may guide in place

    @functools.wraps(step)  # pipelines look at its signature
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        handed = signature.bind(scheduler, *args, **kwargs).arguments
        see_step(list(calls), handed["model_output"], handed["timestep"])
        calls.clear()
        result = step(*args, **kwargs)
        see_latents(result[0])
        return result

    handles = [
        denoiser.register_forward_pre_hook(see_inputs, with_kwargs=True),
        denoiser.register_forward_hook(see_prediction),
    ]
    scheduler.step = watched_step
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del scheduler.step


def _per_sample(timestep: Any, latent: Tensor) -> Tensor:
    """A call's timestep for each of its samples `[n]`."""
    value = torch.as_tensor(timestep, device=latent.device)
    if value.ndim > 1:
        raise UserError("this teacher gives its denoiser a timestep per token: such pipelines cannot be recorded")
    return (value.float() if value.is_floating_point() else value).expand(len(latent))
