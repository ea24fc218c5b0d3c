"""The method's claims, each judged by the rows of a study; one that does not hold is told as such."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from stages.evaluate.comparisons import CFG, CFG_FIRST_50, NONE, ONE_PASS

Row = dict[str, Any]
GAP_GOAL, FRECHET_GOAL, ELSEWHERE_GOAL, ADHERENCE_GOAL = 0.97, 1.03, 0.9, 0.01
FULL, GUIDED, FEW_LONG = "full", "guided", "few_long"
REFERENCE = "reference_"  # begins the names of the adapters that stand for the published recipe


class Claim(NamedTuple):
    """A claim, the goal that stands for it, what was found, and whether it holds."""

    text: str
    goal: str
    found: str
    holds: bool


class NothingToJudgeByError(Exception):
    """The rows that a claim is judged by are not there."""


Judgement = Callable[["Rows"], Claim]  # raises NothingToJudgeByError


def judge(rows: list[Row]) -> list[Claim]:
    """The claims that a study has an evaluation and the adapters for, in the order of `CLAIMS`."""
    judged = []
    for evaluation, claims in CLAIMS.items():
        for claim in claims:
            with suppress(NothingToJudgeByError):
                judged.append(claim(Rows(rows).of(evaluation=evaluation)))
    return judged


class Rows:
    """Rows of a study, to be chosen from."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def of(self, **wanted: Any) -> Rows:
        return Rows(row for row in self.rows if all(row.get(key) == value for key, value in wanted.items()))

    def each(self, key: str) -> list[Any]:
        """The values that there are, each once, in order."""
        return sorted({row[key] for row in self.rows if row.get(key) is not None})

    def mean(self, key: str) -> float:
        values: list[Any] = [row.get(key) for row in self.rows]
        if not values or None in values:
            raise NothingToJudgeByError(key)
        return statistics.fmean(values)

    def format(self, key: str, form: str = ".3f") -> str:
        """The mean over seeds, each a mean over scales, with the largest deviation from it where there are several."""
        seeds = self.each("seed")
        values = [self.of(seed=seed).mean(key) for seed in seeds] or [self.mean(key)]
        mean = statistics.fmean(values)
        spread = max(abs(value - mean) for value in values)
        return f"{mean:{form}} ± {spread:{form}}" if len(values) > 1 else f"{mean:{form}}"


def least_over_scales(rows: Rows, key: str = "gap_closed") -> float:
    scales = rows.each("guidance_scale")
    if not scales:
        raise NothingToJudgeByError(key)
    return min(rows.of(guidance_scale=scale).mean(key) for scale in scales)


def best_adapter(rows: Rows) -> str:
    """Of the frozen base's, the one whose least gap closed over the scales is the greatest."""
    ones = rows.of(method=ONE_PASS)
    names = [name for name in ones.each("name") if name != FULL]
    if not names:
        raise NothingToJudgeByError("adapters of a frozen base")
    return max(names, key=lambda name: least_over_scales(ones.of(name=name)))


def by_scale(rows: Rows, key: str, form: str = ".3f") -> str:
    return ", ".join(
        f"{rows.of(guidance_scale=scale).format(key, form)} at {scale:g}" for scale in rows.each("guidance_scale")
    )


def closes_the_gap(rows: Rows) -> Claim:
    name = best_adapter(rows)
    own = rows.of(method=ONE_PASS, name=name)
    return Claim(
        "One pass is what two passes are", f"the best adapter closes at least {GAP_GOAL} of the gap at each scale",
        f"{name}: {by_scale(own, 'gap_closed')}", least_over_scales(own) >= GAP_GOAL,
    )  # fmt: skip


def frechet_ratios(rows: Rows, name: str) -> dict[float, float]:
    """One pass over CFG, by scale."""
    ones, guided = rows.of(method=ONE_PASS, name=name), rows.of(method=CFG)
    return {
        scale: ones.of(guidance_scale=scale).mean("frechet_distance")
        / guided.of(guidance_scale=scale).mean("frechet_distance")
        for scale in ones.each("guidance_scale")
    }


def as_good_at_each_scale(rows: Rows) -> Claim:
    name = best_adapter(rows)
    ratios = frechet_ratios(rows, name)
    own = rows.of(method=ONE_PASS, name=name)
    return Claim(
        "Its images are as good at each scale", f"Frechet distance at most CFG's times {FRECHET_GOAL}",
        f"{name}: {by_scale(own, 'frechet_distance', '.1f')}; over CFG: {', '.join(f'{r:.3f} at {s:g}' for s, r in ratios.items())}",
        max(ratios.values()) <= FRECHET_GOAL,
    )  # fmt: skip


def as_good_at_its_best(rows: Rows) -> Claim:
    name = best_adapter(rows)
    ones, guided = rows.of(method=ONE_PASS, name=name), rows.of(method=CFG)
    best, least = least_over_scales(ones, "frechet_distance"), least_over_scales(guided, "frechet_distance")
    return Claim(
        "At its best it is not worse", "the least Frechet distance over the scales is not above CFG's",
        f"{name} {best:.1f}, CFG {least:.1f}", best <= least,
    )  # fmt: skip


def beats_the_free_alternative(rows: Rows) -> Claim:
    name = best_adapter(rows)
    ones, partial = rows.of(method=ONE_PASS, name=name), rows.of(method=CFG_FIRST_50)
    wins = all(
        ones.of(guidance_scale=scale).mean("gap_closed") > partial.of(guidance_scale=scale).mean("gap_closed")
        for scale in ones.each("guidance_scale")
    )
    return Claim(
        "It beats CFG on the first half of the steps, at two thirds of its cost", "closes more of the gap at each scale",
        f"{name}: {by_scale(ones, 'gap_closed')}; first half: {by_scale(partial, 'gap_closed')}", wins,
    )  # fmt: skip


def quality(rows: Rows, name: str) -> str:
    return f"{name}: gap closed {rows.format('gap_closed')}, Frechet distance {rows.format('frechet_distance', '.1f')}"


def compared(rows: Rows, text: str, ours: str, other: str, slack: float = 0.0) -> Claim:
    """Whether one adapter closes as much of the gap as another, over all scales."""
    one, two = (rows.of(method=ONE_PASS, name=name) for name in (ours, other))
    return Claim(
        text, f"{ours} closes more of the gap than {other}" if not slack else f"{ours} closes what {other} does, but for {slack}",
        f"{quality(one, ours)}; {quality(two, other)}",
        one.mean("gap_closed") > two.mean("gap_closed") - slack,
    )  # fmt: skip


def guided_trajectories_are_better(equal: str, other: str) -> Judgement:
    """Whether they are, where both sides had as many of something."""

    def claim(rows: Rows) -> Claim:
        text = f"Guided trajectories are better to train on than diffusion trajectories, at as many {equal}"
        found = compared(rows, text, GUIDED, other)
        cost = [
            f"{name}: {rows.of(name=name).mean('teacher_evaluations'):,.0f} evaluations" for name in (GUIDED, other)
        ]
        return found._replace(found="; ".join([found.found, *cost]))

    return claim


def a_frozen_base_is_enough(rows: Rows) -> Claim:
    best = best_adapter(rows)
    claim = compared(rows, "A frozen base with an adapter does what training every weight does", best, FULL, 0.01)
    messages = []
    for name in (best, FULL):
        own = rows.of(method=ONE_PASS, name=name)
        megabytes = own.mean("training_peak_memory_bytes") / 1e6
        messages.append(
            f"{name}: {own.mean('share'):.1%} of the base, {own.mean('training_seconds'):.0f} s, {megabytes:.0f} MB"
        )
    return claim._replace(found="; ".join([claim.found, *messages]))


def a_tenth_of_the_evaluations_is_enough(rows: Rows) -> Claim:
    rows = rows.of(method=ONE_PASS)
    most = rows.of(data=FEW_LONG)
    limit = most.mean("teacher_evaluations") / 10
    tenth = Rows(row for row in rows.rows if row["data"] != FEW_LONG and row["teacher_evaluations"] <= limit)
    curve = "; ".join(
        f"{data}: {int(own.mean('teacher_evaluations')):,} evaluations, Frechet distance {own.format('frechet_distance', '.1f')}, "
        f"gap closed {own.format('gap_closed')}"
        for data in rows.each("data") for own in [rows.of(data=data)]
    )  # fmt: skip
    return Claim(
        "Many short, shifted trajectories take a tenth of the teacher's evaluations",
        "with a tenth of them, a Frechet distance not above that of few long ones", curve,
        tenth.mean("frechet_distance") <= most.mean("frechet_distance"),
    )  # fmt: skip


def better_than_the_reference(rows: Rows) -> Claim:
    rows = rows.of(method=ONE_PASS)
    names = rows.each("name")
    gap = {name: rows.of(name=name).mean("gap_closed") for name in names}
    theirs = [name for name in names if name.startswith(REFERENCE)]
    if not theirs or theirs == names:
        raise NothingToJudgeByError(REFERENCE)
    return Claim(
        "Better than the reference recipe on the same teacher", "closes more of the gap than each of its adapters",
        "; ".join(quality(rows.of(name=name), name) for name in names),
        min(gap[name] for name in names if name not in theirs) > max(gap[name] for name in theirs),
    )  # fmt: skip


def holds_elsewhere(text: str) -> Judgement:
    """Whether an adapter closes most of the gap where it was not trained."""

    def claim(rows: Rows) -> Claim:
        own = rows.of(method=ONE_PASS)
        return Claim(
            text, f"closes at least {ELSEWHERE_GOAL} of the gap at each scale",
            f"{by_scale(own, 'gap_closed')}; Frechet distance {by_scale(own, 'frechet_distance', '.1f')}; "
            f"CFG {by_scale(rows.of(method=CFG), 'frechet_distance', '.1f')}",
            least_over_scales(own) >= ELSEWHERE_GOAL,
        )  # fmt: skip

    return claim


def prompts_are_met(text: str) -> Judgement:
    """Whether images show what was asked for as often as under CFG, over all scales."""

    def claim(rows: Rows) -> Claim:
        none, cfg, one = (rows.of(method=method) for method in (NONE, CFG, ONE_PASS))
        keys = [key for key in ("class_accuracy", "stroke_accuracy", "slant_accuracy") if rows.each(key)]
        if not keys:
            raise NothingToJudgeByError("accuracies")
        format = [
            f"{key.replace('_', ' ')}: one pass {one.format(key)}, CFG {cfg.mean(key):.3f}, none {none.mean(key):.3f}"
            for key in keys
        ]
        holds = all(one.mean(key) >= cfg.mean(key) - ADHERENCE_GOAL for key in keys)
        goal = f"{', '.join(key.removesuffix('_accuracy') for key in keys)} within {ADHERENCE_GOAL} of CFG's"
        return Claim(text, goal, "; ".join([*format, f"gap closed {one.format('gap_closed')}"]), holds)

    return claim


CLAIMS: dict[str, list[Judgement]] = {
    "scales": [
        closes_the_gap,
        as_good_at_each_scale,
        as_good_at_its_best,
        beats_the_free_alternative,
        a_frozen_base_is_enough,
    ],
    "trajectories": [
        guided_trajectories_are_better("evaluations of the teacher", "diffusion"),
        guided_trajectories_are_better("records", "diffusion_twice"),
    ],
    "data_cost": [a_tenth_of_the_evaluations_is_enough],
    "reference": [better_than_the_reference],
    "outside": [holds_elsewhere("It goes on outside the scales of its training")],
    "other_sampler": [holds_elsewhere("It does not depend on the sampler of its training")],
    "fewer_steps": [holds_elsewhere("It does not depend on the number of steps")],
    "checkpoint": [holds_elsewhere("It moves to a fine-tuned checkpoint of the same base")],
    "text": [prompts_are_met("Prompts are met as under CFG")],
    "text_lora": [prompts_are_met("Prompts are met as under CFG, with a LoRA loaded into the pipeline")],
}
