"""Trial runs of a pipeline: a few steps, kept in full."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.base.arguments import Axis, argument
from stages.base.denoiser import bind_inputs, denoiser_of, denoisers_of, latent_name
from stages.base.hooks import Call, watch_steps
from stages.base.loading import first_line
from stages.base.patching import patched
from stages.base.sampling import Kept, Request, guider_of, no_guidance_of, sample, scale_keyword, undecoded
from stages.base.size import DEFAULT_SIZE, size_name
from stages.errors import UserError

PROBED_STEPS = 3  # the last one counts: some guidance rules skip the first
PROBED_SCALES = (3.0, 7.0)
SAME, DIFFERENT = 0.02, 0.05  # relative distances; text encoders round differently in other batches


@dataclass(frozen=True)
class Seen:
    """One step of a trial run: denoiser calls, predictions that the scheduler and its copies received, its timestep."""

    calls: list[Call]
    received: list[Tensor]
    timestep: float

    @property
    def prediction(self) -> Tensor:
        return self.received[0]


class DoesNotRunError(UserError):
    """A pipeline's own code raised an error."""


def probe(pipe: Any, request: Request, guidance_scale: float) -> list[Seen]:
    """Run a pipeline for a few steps and return them.

    Raises:
        DoesNotRunError: the pipeline fails.
    """
    return probe_to_images(pipe, request, guidance_scale)[0]


def probe_to_images(pipe: Any, request: Request, guidance_scale: float) -> tuple[list[Seen], Kept]:
    """Run a pipeline for a few steps; return them, and the final latents.

    Raises:
        DoesNotRunError: the pipeline fails.
    """
    steps: list[Seen] = []
    return steps, _run(pipe, request, guidance_scale, lambda c, r, t: steps.append(Seen(c, r, float(t))))


def rows_by_step(pipe: Any, request: Request, guidance_scale: float) -> list[tuple[int, ...]]:
    """The number of rows in each denoiser call of each step.

    The denoisers run once for each set of shapes, and repeat that output in the other calls: the numbers of rows follow
    from the steps' numbers alone, and the run costs hardly more than its scheduler. A pipeline that needs more of its
    denoiser than the output (self-attention guidance reads its attention maps) runs it in each call.

    Raises:
        DoesNotRunError: the pipeline fails.
    """
    rows: list[tuple[int, ...]] = []
    try:
        with ExitStack() as stack:
            for denoiser in denoisers_of(pipe).values():
                stack.enter_context(patched(denoiser, "forward", _repeating()))
            _run(pipe, request, guidance_scale, lambda calls, r, t: rows.append(tuple(rows_of(pipe, calls))))
    except DoesNotRunError:
        return [tuple(rows_of(pipe, step.calls)) for step in probe(pipe, request, guidance_scale)]
    return rows


def _repeating() -> Callable[..., Any]:
    kept: dict[tuple[Any, ...], Any] = {}

    def run(forward: Callable[..., Any], denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = bind_inputs(denoiser, args, kwargs)
        shapes = tuple((name, value.shape) for name, value in inputs.items() if isinstance(value, Tensor))
        if shapes not in kept:
            kept[shapes] = forward(*args, **kwargs)
        return copy.deepcopy(kept[shapes])  # pipelines may modify it in place

    return run


def _run(pipe: Any, request: Request, guidance_scale: float, see_step: Callable[[list[Call], Any, Any], None]) -> Kept:
    parts: list[Any] = [part for part in denoisers_of(pipe).values() if hasattr(part, "attn_processors")]
    processors = [(part, dict(part.attn_processors)) for part in parts]
    try:
        with undecoded(pipe) as kept, watch_steps(pipe, see_step, streams=None):
            sample(pipe, request, guidance_scale)
        return kept
    except UserError:
        raise
    except Exception as error:  # a pipeline's own code may raise anything
        for part, before in processors:
            part.set_attn_processor(before)  # a failing pipeline leaves those that its guidance has set
        size = size_name(request.conditions[0])
        at, way_out = ("", "") if size == DEFAULT_SIZE else (f"size {size}, ", "name another size, or ")
        raise DoesNotRunError(
            f"{type(pipe).__name__} does not run at {at}scale {guidance_scale:g}: {type(error).__name__}: "
            f"{first_line(error)}: {way_out}give its call what it needs (teacher.call.NAME=..., a column of the prompts)"
        ) from error


def probe_at(pipe: Any, request: Request, settings: dict[str, float]) -> list[Seen]:
    """Run a pipeline for a few steps with settings of its guidance, including the scale; a guider has no settings."""
    others, guider = dict(settings), guider_of(pipe)
    scale = others.pop(scale_keyword(pipe)) if guider is None else no_guidance_of(guider)
    return probe(pipe, replace(request, arguments=request.arguments | others), scale)


def rows_of(pipe: Any, calls: list[Call]) -> list[int]:
    """The number of rows in each call of a step."""
    latent = latent_name(denoiser_of(pipe)[1])
    return [len(argument(call.inputs, latent, Axis(listed=latent not in call.inputs))) for call in calls]


def format_rows(rows: list[int]) -> str:
    return (
        "its scheduler steps without a denoiser's call before"
        if not rows
        else f"its denoiser sees {' and '.join(map(str, rows))} rows"
    )


def has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def distance(one: Any, other: Any) -> float:
    """The distance of two tensors, or lists of tensors, relative to their norm; infinite where their shapes differ."""
    if isinstance(one, list) or isinstance(other, list):
        comparable = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
        return max(map(distance, one, other)) if comparable else float("inf")
    if one.shape != other.shape:
        return float("inf")
    if not one.is_floating_point() and not one.is_complex():
        return 0.0 if torch.equal(one, other) else float("inf")
    one, other = one.to(torch.complex64 if one.is_complex() else torch.float32), other
    size = torch.maximum(one.norm(), other.to(one).norm())
    return float((one - other.to(one)).norm() / size.clamp(min=1e-12))


def uncertain(pipe: Any, found: str) -> UserError:
    return UserError(
        f"{type(pipe).__name__} cannot be recorded: where the conditional pass lies is not certain: {found}: give its call "
        "what it needs (teacher.call.NAME=..., a column of the prompts), or take another class (teacher.pipeline_class=...)"
    )
