"""Trial runs without a pipeline's own guidance: which settings switch it off, and whether samples share a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.base.arguments import encoded
from stages.base.hooks import Call
from stages.base.sampling import Request, guider_of, scale_keyword
from stages.errors import UserError
from stages.generate.probing import (
    DIFFERENT,
    SAME,
    DoesNotRunError,
    Seen,
    distance,
    format_rows,
    has_rows,
    is_number,
    probe_at,
    rows_of,
    uncertain,
)

ROUNDING = 1e-3  # relative distance below which float32 predictions are equal


@dataclass(frozen=True)
class Unguided:
    """The result of the trial runs without guidance.

    Attributes:
        settings: the call's arguments that switch guidance off.
        one, two: the steps of one sample, and of two equal samples; None where a call takes only one sample.
        mixed_up: whether a sample's prediction depends on the others of its call.
        following: the arguments that depend on the prompt without a dimension for samples.
        beside: the arguments that a sample gets only in a batch with a longer prompt, mostly masks.
    """

    settings: dict[str, float]
    one: list[Seen]
    two: list[Seen] | None
    mixed_up: bool = False
    following: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def steps(self) -> list[Seen]:
        """The steps of two samples if a call takes them, else of one."""
        return self.one if self.two is None else self.two


def guidance_rule(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's guidance rule: its name and settings."""
    guider = guider_of(pipe)
    if guider is not None:
        settings = {name: value for name, value in guider.config.items() if not name.startswith("_")}
        return {"name": type(guider).__name__} | {k: v for k, v in settings.items() if k != "guidance_scale"}
    defaults = inspect.signature(type(pipe).__call__).parameters
    values = {name: arguments.get(name, p.default) for name, p in defaults.items()}
    keyword = scale_keyword(pipe)
    named = {k: v for k, v in values.items() if _is_of_guidance(k) and k != keyword and is_number(v)}
    return {"name": "ClassifierFreeGuidance", "pipeline": type(pipe).__name__} | named


def _is_of_guidance(name: str) -> bool:
    return any(word in name for word in ("guidance", "pag_", "sag_", "stg_", "cfg_", "modality_scale"))


def without_guidance(pipe: Any, once: Request, twice: Request) -> Unguided:
    """Find settings that switch guidance off, so that a step is one call with one row per sample.

    Raises:
        UserError: no setting does it.
    """
    found, failed = "", None
    for settings in _settings_without_guidance(pipe, once.arguments):
        try:
            one = probe_at(pipe, once, settings)
        except DoesNotRunError as error:
            failed = failed or error
            continue
        rows = rows_of(pipe, one[-1].calls) if one else []
        if rows == [1]:
            two = _two_samples(pipe, twice, settings, one)
            return _with_longer_prompt(pipe, twice, Unguided(settings, one, two))
        found = found or f"{format_rows(rows)} in a step for one sample"
    raise uncertain(pipe, f"without guidance {found}") if found or failed is None else failed


def _settings_without_guidance(pipe: Any, arguments: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Candidates that may switch guidance off: a scale of 1 or 0, combined with the scales of other rules."""
    if guider_of(pipe) is not None:
        yield {}
        return
    keyword, rule = scale_keyword(pipe), guidance_rule(pipe, arguments)
    others = [name for name in rule if name.endswith("_scale") and name != "guidance_scale" and "adaptive" not in name]
    for scale in (1.0, 0.0):
        yield {keyword: scale}
        if others:
            yield {keyword: scale} | dict.fromkeys(others, 0.0)
            yield {keyword: scale} | dict.fromkeys(others, 1.0)


def _two_samples(pipe: Any, twice: Request, settings: dict[str, float], one: list[Seen]) -> list[Seen] | None:
    """The steps of two equal samples in one call; None where a call takes only one sample, or mixes samples."""
    try:
        two = probe_at(pipe, twice, settings)
    except DoesNotRunError:
        return None
    if len(two) != len(one) or rows_of(pipe, two[-1].calls) != [2] or not _grows(one[-1].calls[0], two[-1].calls[0]):
        return None
    alone, both = one[0].calls[0].prediction, two[0].calls[0].prediction
    difference = max(distance(alone, both[i : i + 1]) for i in (0, 1))
    return two if difference < DIFFERENT else None


def _grows(one: Call, two: Call) -> bool:
    """Whether a second sample doubles one dimension of an argument at most, and changes no other dimension."""
    for name, value in one.inputs.items():
        other = two.inputs.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim == other.ndim:
            changed = [(a, b) for a, b in zip(value.shape, other.shape, strict=True) if a != b]
            if len(changed) > 1 or any(b != 2 * a for a, b in changed):
                return False
    return True


def _with_longer_prompt(pipe: Any, twice: Request, unguided: Unguided) -> Unguided:
    """Add the effects of a longer prompt: some pipelines pad texts to the longest of a call without a mask.

    Raises:
        UserError: an argument that is no tensor depends on the prompt, or one grows in another dimension than its
            tokens.
    """
    first, second = twice.conditions
    longer = {k: f"{v} {v}" if isinstance(v, str) and "prompt" in k else v for k, v in second.items()}
    if longer == second:
        return unguided
    settings, before = unguided.settings, unguided.one[0].calls[0]
    try:
        alone = probe_at(pipe, replace(twice, conditions=[longer], seeds=twice.seeds[:1]), settings)[0].calls[0]
    except DoesNotRunError:  # the doubled prompt is too long
        return unguided
    numbers = {k: v for k, v in before.inputs.items() if not isinstance(v, Tensor) and _is_constant(v)}
    if changed := [name for name, value in numbers.items() if alone.inputs.get(name) != value]:
        raise UserError(
            f"{type(pipe).__name__} cannot be recorded: its denoiser's {changed[0]} follows the prompt and is no tensor: take "
            "prompts of one length, or another class (teacher.pipeline_class=...)"
        )
    if changed := [name for name, value in before.inputs.items() if _grows_within(value, alone.inputs.get(name))]:
        raise UserError(
            f"{type(pipe).__name__} cannot be recorded: its denoiser's {changed[0]} has another shape with a longer prompt: take "
            "another class (teacher.pipeline_class=...)"
        )
    following = [name for name, value in before.inputs.items() if _follows(value, alone.inputs.get(name))]
    if unguided.two is None:
        return replace(unguided, following=tuple(following))
    both = probe_at(pipe, replace(twice, conditions=[first, longer]), settings)[0].calls[0]
    rounding = ROUNDING if before.prediction.dtype == torch.float32 else SAME
    difference = distance(before.prediction, both.prediction[: len(before.prediction)])
    beside = [name for name, value in both.inputs.items() if name not in before.inputs and has_rows(value, 2)]
    # A mask over text and image tokens together does not fit a text of another length.
    wide = [name for name in beside if both.inputs[name].ndim > 2]
    beside = [name for name in beside if name not in wide]
    return replace(
        unguided, mixed_up=bool(wide) or difference > rounding, following=tuple(following), beside=tuple(beside)
    )


def _is_constant(value: Any) -> bool:
    """Whether JSON can store a value; the check of the conditional call refuses other values."""
    try:
        encoded(value, 1)
    except TypeError:
        return False
    return True


def _grows_within(value: Any, other: Any) -> bool:
    """Whether two tensors of one sample differ in another dimension than that of their tokens, the second."""
    both = isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim == other.ndim > 2
    return both and value.shape[2:] != other.shape[2:]


def _follows(value: Any, other: Any) -> bool:
    """Whether a tensor without a dimension for samples changes its length with the prompt."""
    both = isinstance(value, Tensor) and isinstance(other, Tensor)
    return both and value.ndim > 0 and value.shape != other.shape and len(value) > 1
