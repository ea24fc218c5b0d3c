"""The number of steps of a teacher's run, found from its scheduler and its pipeline without weights."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from stages.base.loading import diffusers_class, first_line
from stages.base.noise_levels import set_timesteps
from stages.errors import UsageError, UserError
from stages.generate.conditions import pipeline_class_of, read_config
from stages.generate.config import TeacherConfig


def count_steps(teacher: TeacherConfig, num_inference_steps: int) -> int:
    """The scheduler steps of one sampling run; `num_inference_steps` where the scheduler is unknown.

    Raises:
        UsageError: the scheduler cannot take so many steps.
        UserError: the scheduler cannot be loaded.
    """
    scheduler = scheduler_of(teacher)
    timesteps = None if scheduler is None else timesteps_of(scheduler, num_inference_steps)
    if timesteps is None:
        return num_inference_steps
    steps = len(kept_by_pipeline(teacher, scheduler, num_inference_steps, timesteps))
    if steps == 0:
        raise UsageError(
            f"num_inference_steps={num_inference_steps}: no step is left of them: raise it, or teacher.call.strength"
        )
    return steps


def scheduler_of(teacher: TeacherConfig) -> Any:
    """The teacher's scheduler; None where its pipeline names none, or one outside diffusers."""
    if "scheduler" not in read_config(teacher):
        return None
    config = read_config(teacher, "scheduler")
    if teacher.scheduler is None and not hasattr(diffusers, str(config.get("_class_name"))):
        return None
    name = teacher.scheduler or config["_class_name"]
    kind = diffusers_class(name, "teacher.scheduler")
    if not hasattr(kind, "set_timesteps"):
        raise UserError(f"teacher.scheduler={name}: no scheduler: name one of diffusers, e.g. DDIMScheduler")
    try:
        return kind.from_config(config)
    except ImportError as error:
        raise UserError(f"teacher.scheduler={name}: {first_line(error)}") from error
    except (KeyError, TypeError, ValueError):  # loading the teacher reports it
        return None


def timesteps_of(scheduler: Any, num_inference_steps: int) -> torch.Tensor | None:
    """A scheduler's timesteps `[steps]` for `num_inference_steps`; None where it needs more than that number.

    Raises:
        UsageError: it cannot make so many.
    """
    most, name = scheduler.config.get("num_train_timesteps") or 0, type(scheduler).__name__
    option = f"num_inference_steps={num_inference_steps}"
    too_many = f"{option}: at most {most}, the timesteps of the teacher's scheduler"
    try:
        set_timesteps(scheduler, num_inference_steps)
        timesteps = scheduler.timesteps
    except ValueError as error:
        reason = too_many if 0 < most < num_inference_steps else f"{option}: {name}: {first_line(error)}"
        raise UsageError(reason) from error
    except (AttributeError, KeyError, TypeError, RuntimeError):
        return None
    if len(timesteps.unique()) < min(num_inference_steps, len(timesteps)):
        raise UsageError(too_many)
    counts_down_from_one = timesteps.is_floating_point() and 0 < float(timesteps.max()) <= 1
    # On a scale from 1 to 0, timestep 0 is the finished image, and pipelines stop before it.
    return timesteps[:-1] if counts_down_from_one and timesteps[-1] == 0 else timesteps


def kept_by_pipeline(
    teacher: TeacherConfig, scheduler: Any, num_inference_steps: int, timesteps: torch.Tensor
) -> torch.Tensor:
    """The timesteps of the steps that a pipeline runs; a call with `strength` starts later on the grid."""
    kind: Any = pipeline_class_of(teacher)
    ask, known = getattr(kind, "get_timesteps", None), {} if kind is None else call_of(kind)
    if ask is None or "strength" not in known:
        return timesteps
    supplied = {
        "num_inference_steps": num_inference_steps,
        "timesteps": timesteps,
        "strength": dict(teacher.call).get("strength", known["strength"].default),
        "device": "cpu",
        "denoising_start": dict(teacher.call).get("denoising_start"),
    }
    asked = list(inspect.signature(ask).parameters)[1:]
    if set(asked) - supplied.keys():
        return timesteps
    try:
        return ask(SimpleNamespace(scheduler=scheduler), **{name: supplied[name] for name in asked})[0]
    except (AttributeError, TypeError, ValueError):  # the method needs more than the scheduler
        return timesteps


def call_of(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's `__call__` by name."""
    return dict(inspect.signature(pipeline_class.__call__).parameters)
