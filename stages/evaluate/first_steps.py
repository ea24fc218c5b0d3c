"""CFG on the first steps only: a baseline that needs no training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from stages.base.denoiser import denoisers_of, latent_name
from stages.base.hooks import SchedulerStep
from stages.base.patching import patched
from stages.errors import UserError

Forward = Callable[..., Any]


@contextmanager
def guided_first(
    pipe: Any, place: dict[str, int] | None, percent: int, steps: list[SchedulerStep], n: int
) -> Iterator[None]:
    """Within the context, the pipeline guides the first steps, and each later step costs one conditional pass.

    The first `ceil(percent / 100 * T)` of the scheduler's T timesteps are guided. Afterwards the denoiser runs the
    conditional part only and returns it as the unconditional part, too, so that `u + w (c - u) = c` for any `w`.

    Args:
        place: call, chunk and number of chunks of a guided step's unconditional part, from an adapter's metadata.
        steps: the scheduler's steps so far, as `scheduler_steps` lists them.
        n: number of images.

    Raises:
        UserError: the position of the conditional part is unknown, or it runs after the unconditional one.
    """
    in_calls = _in_calls(pipe, place)
    conditional: dict[int, Forward] = {}

    def first(forward: Forward, denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        guided = -(-percent * len(pipe.scheduler.timesteps) // 100)
        if len(steps) < guided:
            return forward(*args, **kwargs)
        if id(denoiser) not in conditional:
            alone = once_per_step(forward, steps) if in_calls else _of_chunks(denoiser, forward, place, n)
            conditional[id(denoiser)] = alone
        return conditional[id(denoiser)](*args, **kwargs)

    with ExitStack() as stack:
        for denoiser in denoisers_of(pipe).values():
            stack.enter_context(patched(denoiser, "forward", first))
        yield


def _in_calls(pipe: Any, place: dict[str, int] | None) -> bool:
    """Whether a guided step makes two calls, the conditional one first; else it makes one call with a doubled batch."""
    name = type(pipe).__name__
    way_out = "leave cfg_first_50 and cfg_first_60 out of methods=[...]"
    if place is None:
        raise UserError(f"{name}: the unconditional part of a guided step is unknown: {way_out}")
    if place["chunks"] > 2:
        raise UserError(f"{name}: a guided step has {place['chunks']} parts, not two: {way_out}")
    if place["chunks"] == 1 and place["call"] == 0:
        raise UserError(f"{name}: a guided step runs its unconditional part first: {way_out}")
    return place["chunks"] == 1


def once_per_step(forward: Forward, steps: list[SchedulerStep]) -> Forward:
    """Run the first call of each step, and return its output for the later calls of the step."""
    kept: dict[int, Any] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(steps) in kept:
            return kept[len(steps)]
        kept.clear()
        output = forward(*args, **kwargs)
        kept[len(steps)] = copy.deepcopy(output)  # pipelines may modify it in place
        return output

    return run


def _of_chunks(denoiser: Any, forward: Forward, place: dict[str, int] | None, n: int) -> Forward:
    """Run the conditional chunk of a doubled batch and return it twice; a batch of n is all conditional."""
    assert place is not None
    name, rows = latent_name(denoiser), slice((1 - place["chunk"]) * n, (2 - place["chunk"]) * n)

    def run(*args: Any, **kwargs: Any) -> Any:
        size = len(args[0] if args else kwargs[name])
        if size == n:
            return forward(*args, **kwargs)
        output = forward(*select_rows(args, size, rows), **select_rows(kwargs, size, rows))
        if isinstance(output, tuple):
            return (torch.cat([output[0]] * 2), *output[1:])
        output.sample = torch.cat([output.sample] * 2)
        return output

    return run


def select_rows(given: Any, size: int, rows: slice) -> Any:
    """Arguments in which every tensor of `size` rows is reduced to the given rows."""
    match given:
        case Tensor():
            return given[rows] if given.ndim and len(given) == size else given
        case dict():
            return {name: select_rows(value, size, rows) for name, value in given.items()}
        case tuple() | list():
            return type(given)(select_rows(value, size, rows) for value in given)
    return given
