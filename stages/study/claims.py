"""The judgements that a study's file names for its claims, each by the rows of one evaluation."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import MISSING

from stages.configuration.options import option
from stages.errors import UsageError
from stages.evaluate.comparisons import CFG, CFG_FIRST_50, NONE, ONE_PASS
from stages.study.claims_table import Claim

Row = dict[str, Any]
ACCURACIES = ("class_accuracy", "stroke_accuracy", "slant_accuracy")


class Finding(NamedTuple):
    """What a judgement asks for, the figures that it found, and whether they reach the goal."""

    goal: str
    found: str
    holds: bool


class MissingRowsError(Exception):
    """The evaluation lacks the rows, or the measurements, that a judgement needs."""


@dataclass
class ClaimPlan:
    """A claim as a study's file states it."""

    text: str = option(MISSING, "the claim, as the report prints it")
    judgement: str = option(MISSING, "how it is judged: a name in `JUDGEMENTS`")
    evaluation: str = option(MISSING, "the evaluation whose rows it is judged by")
    adapters: list[str] = option(MISSING, "adapters of that evaluation; of several, the best one is judged")
    against: list[str] | None = option(None, "adapters of that evaluation to compare with, if the judgement compares")
    threshold: float | None = option(None, "the goal's figure, if the judgement has one")

    def arguments(self) -> dict[str, Any]:
        """The judgement's arguments, by name, that the file gives."""
        given = {"adapters": self.adapters, "against": self.against, "threshold": self.threshold}
        return {name: value for name, value in given.items() if value is not None}


def judge(plans: Mapping[str, ClaimPlan], rows: list[Row]) -> list[Claim]:
    """Judge the claims, in their order; one whose rows are missing is left out."""
    claims = []
    for plan in plans.values():
        with suppress(MissingRowsError):
            own = Rows(rows).where(evaluation=plan.evaluation)
            claims.append(Claim(plan.text, *JUDGEMENTS[plan.judgement](own, **plan.arguments())))
    return claims


def check_arguments(key: str, plan: ClaimPlan) -> None:
    """
    Raises:
        UsageError: there is no such judgement, or the claim lacks an argument of it or has one too many.
    """
    if plan.judgement not in JUDGEMENTS:
        raise UsageError(f"{key}.judgement={plan.judgement}: one of {', '.join(JUDGEMENTS)}")
    needed = [*inspect.signature(JUDGEMENTS[plan.judgement]).parameters][1:]
    given = plan.arguments()
    for name in needed:
        if name not in given:
            raise UsageError(f"{key}.{name}: not given: {plan.judgement} needs it")
    for name in given:
        if name not in needed:
            raise UsageError(f"{key}.{name}={given[name]}: {plan.judgement} takes no {name}: leave it out")


class Rows:
    """Rows of a study, to filter and average."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def where(self, **values: Any) -> Rows:
        return Rows(row for row in self.rows if all(row.get(key) == value for key, value in values.items()))

    def named(self, names: list[str]) -> Rows:
        """The one-pass rows of these adapters."""
        return Rows(row for row in self.where(method=ONE_PASS).rows if row["name"] in names)

    def unique(self, key: str) -> list[Any]:
        """The distinct values of a column, sorted."""
        return sorted({row[key] for row in self.rows if row.get(key) is not None})

    def mean(self, key: str) -> float:
        values: list[Any] = [row.get(key) for row in self.rows]
        if not values or None in values:
            raise MissingRowsError(key)
        return statistics.fmean(values)

    def format(self, key: str, form: str = ".3f") -> str:
        """The mean over the seeds of their means over scales; with several seeds, ± the largest deviation from it."""
        seeds = self.unique("seed")
        values = [self.where(seed=seed).mean(key) for seed in seeds] or [self.mean(key)]
        mean = statistics.fmean(values)
        spread = max(abs(value - mean) for value in values)
        return f"{mean:{form}} ± {spread:{form}}" if len(values) > 1 else f"{mean:{form}}"

    def by_scale(self, key: str, form: str = ".3f") -> str:
        scales = self.unique("guidance_scale")
        return ", ".join(f"{self.where(guidance_scale=scale).format(key, form)} at {scale:g}" for scale in scales)

    def least_over_scales(self, key: str) -> float:
        scales = self.unique("guidance_scale")
        if not scales:
            raise MissingRowsError(key)
        return min(self.where(guidance_scale=scale).mean(key) for scale in scales)

    def quality(self, name: str) -> str:
        own = self.named([name])
        return (
            f"{name}: gap closed {own.format('gap_closed')}, Frechet distance {own.format('frechet_distance', '.1f')}"
        )


def best_adapter(rows: Rows, adapters: list[str]) -> str:
    """The adapter whose least share of the gap closed, over the scales, is the greatest."""
    return max(adapters, key=lambda name: rows.named([name]).least_over_scales("gap_closed"))


def closes_gap(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """The adapter closes that share of the gap between no guidance and CFG, at each scale."""
    name = best_adapter(rows, adapters)
    own = rows.named([name])
    return Finding(
        f"the best adapter closes at least {threshold} of the gap at each scale",
        f"{name}: {own.by_scale('gap_closed')}",
        own.least_over_scales("gap_closed") >= threshold,
    )


def closes_gap_elsewhere(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """As `closes_gap`, where sampling differs from training; the figures include Frechet distances."""
    own = rows.named([best_adapter(rows, adapters)])
    return Finding(
        f"closes at least {threshold} of the gap at each scale",
        f"{own.by_scale('gap_closed')}; Frechet distance {own.by_scale('frechet_distance', '.1f')}; "
        f"CFG {rows.where(method=CFG).by_scale('frechet_distance', '.1f')}",
        own.least_over_scales("gap_closed") >= threshold,
    )


def frechet_at_each_scale(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """The Frechet distance is at most CFG's times the threshold, at each scale."""
    name = best_adapter(rows, adapters)
    own, cfg = rows.named([name]), rows.where(method=CFG)
    ratios = {
        scale: own.where(guidance_scale=scale).mean("frechet_distance")
        / cfg.where(guidance_scale=scale).mean("frechet_distance")
        for scale in own.unique("guidance_scale")
    }
    over_cfg = ", ".join(f"{ratio:.3f} at {scale:g}" for scale, ratio in ratios.items())
    return Finding(
        f"Frechet distance at most CFG's times {threshold}",
        f"{name}: {own.by_scale('frechet_distance', '.1f')}; over CFG: {over_cfg}",
        max(ratios.values()) <= threshold,
    )


def frechet_at_best_scale(rows: Rows, adapters: list[str]) -> Finding:
    """The least Frechet distance over the scales is at most CFG's."""
    name = best_adapter(rows, adapters)
    own = rows.named([name]).least_over_scales("frechet_distance")
    cfg = rows.where(method=CFG).least_over_scales("frechet_distance")
    return Finding(
        "the least Frechet distance over the scales is not above CFG's", f"{name} {own:.1f}, CFG {cfg:.1f}", own <= cfg
    )


def beats_partial_guidance(rows: Rows, adapters: list[str]) -> Finding:
    """The adapter closes more of the gap than CFG on the first half of the steps, at each scale."""
    name = best_adapter(rows, adapters)
    own, partial = rows.named([name]), rows.where(method=CFG_FIRST_50)
    return Finding(
        "closes more of the gap at each scale",
        f"{name}: {own.by_scale('gap_closed')}; first half: {partial.by_scale('gap_closed')}",
        all(
            own.where(guidance_scale=scale).mean("gap_closed") > partial.where(guidance_scale=scale).mean("gap_closed")
            for scale in own.unique("guidance_scale")
        ),
    )


def matches(rows: Rows, adapters: list[str], against: list[str], threshold: float) -> Finding:
    """The adapter closes as much of the gap as each of the others, up to the threshold; the figures include costs."""
    name = best_adapter(rows, adapters)
    names = [name, *against]
    gap = {each: rows.named([each]).mean("gap_closed") for each in names}
    return Finding(
        f"{name} closes what {' and '.join(against)} does, but for {threshold}",
        "; ".join([*map(rows.quality, names), *(training_cost(rows, each) for each in names)]),
        all(gap[name] > gap[other] - threshold for other in against),
    )


def training_cost(rows: Rows, name: str) -> str:
    own = rows.named([name])
    megabytes = own.mean("training_peak_memory_bytes") / 1e6
    return f"{name}: {own.mean('share'):.1%} of the base, {own.mean('training_seconds'):.0f} s, {megabytes:.0f} MB"


def outperforms(rows: Rows, adapters: list[str], against: list[str]) -> Finding:
    """The adapter closes more of the gap than each of the others; the figures include the teacher's evaluations."""
    name = best_adapter(rows, adapters)
    names = [name, *against]
    gap = {each: rows.named([each]).mean("gap_closed") for each in names}
    costs = [f"{each}: {rows.named([each]).mean('teacher_evaluations'):,.0f} evaluations" for each in names]
    return Finding(
        f"{name} closes more of the gap than {' and '.join(against)}",
        "; ".join([*map(rows.quality, names), *costs]),
        all(gap[name] > gap[other] for other in against),
    )


def needs_a_tenth(rows: Rows, adapters: list[str], against: list[str]) -> Finding:
    """Adapters of at most a tenth of the others' teacher evaluations have a Frechet distance not above theirs."""
    most = rows.named(against)
    limit = most.mean("teacher_evaluations") / 10
    tenth = Rows(row for row in rows.named(adapters).rows if row["teacher_evaluations"] <= limit)
    curve = []
    for data in rows.named([*adapters, *against]).unique("data"):
        own = rows.named([*adapters, *against]).where(data=data)
        curve.append(
            f"{data}: {own.mean('teacher_evaluations'):,.0f} evaluations, "
            f"Frechet distance {own.format('frechet_distance', '.1f')}, gap closed {own.format('gap_closed')}"
        )
    return Finding(
        "with a tenth of them, a Frechet distance not above that of few long ones",
        "; ".join(curve),
        tenth.mean("frechet_distance") <= most.mean("frechet_distance"),
    )


def beats_each(rows: Rows, adapters: list[str], against: list[str]) -> Finding:
    """Every adapter closes more of the gap than each of the others."""
    names = sorted([*adapters, *against])
    gap = {name: rows.named([name]).mean("gap_closed") for name in names}
    return Finding(
        "closes more of the gap than each of its adapters",
        "; ".join(map(rows.quality, names)),
        min(gap[name] for name in adapters) > max(gap[name] for name in against),
    )


def meets_prompts(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """Images show what their prompts ask for as often as under CFG, up to the threshold, over all scales."""
    own, cfg, none = rows.named([best_adapter(rows, adapters)]), rows.where(method=CFG), rows.where(method=NONE)
    keys = [key for key in ACCURACIES if rows.unique(key)]
    if not keys:
        raise MissingRowsError("accuracies")
    figures = [
        f"{key.replace('_', ' ')}: one pass {own.format(key)}, CFG {cfg.mean(key):.3f}, none {none.mean(key):.3f}"
        for key in keys
    ]
    return Finding(
        f"{', '.join(key.removesuffix('_accuracy') for key in keys)} within {threshold} of CFG's",
        "; ".join([*figures, f"gap closed {own.format('gap_closed')}"]),
        all(own.mean(key) >= cfg.mean(key) - threshold for key in keys),
    )


JUDGEMENTS: dict[str, Callable[..., Finding]] = {
    function.__name__: function
    for function in (
        closes_gap,
        closes_gap_elsewhere,
        frechet_at_each_scale,
        frechet_at_best_scale,
        beats_partial_guidance,
        matches,
        outperforms,
        needs_a_tenth,
        beats_each,
        meets_prompts,
    )
}
