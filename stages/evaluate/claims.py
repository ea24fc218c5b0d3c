"""The method's claims, each judged by the rows of a study; one that does not hold is told as such."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from stages.evaluate.comparisons import CFG, CFG_FIRST_50, NONE, ONE_PASS

Row = dict[str, Any]
GAP_GOAL, FRECHET_GOAL, ELSEWHERE_GOAL, ADHERENCE_GOAL = 0.97, 1.03, 0.9, 0.01
FULL, DEFAULT = "full", "default"


class Claim(NamedTuple):
    """A claim, the goal that stands for it, what was found, and whether it holds."""

    text: str
    goal: str
    found: str
    holds: bool


def judge(rows: list[Row]) -> list[Claim]:
    """The claims that a study has an evaluation for, in the order of `CLAIMS`."""
    return [
        claim(found)
        for evaluation, claims in CLAIMS.items()
        for claim in claims
        if (found := Rows(rows).of(evaluation=evaluation)).rows
    ]


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
        return statistics.fmean(row[key] for row in self.rows)

    def told(self, key: str, form: str = ".3f") -> str:
        """The mean over seeds, with the largest deviation from it where there are several."""
        values = [row[key] for row in self.rows]
        mean = statistics.fmean(values)
        spread = max(abs(value - mean) for value in values)
        return f"{mean:{form}} ± {spread:{form}}" if len(values) > 1 else f"{mean:{form}}"


def best_adapter(rows: Rows) -> str:
    """Of the frozen base's, the one whose least gap closed over the scales is the greatest."""
    ones = rows.of(method=ONE_PASS)
    names = [name for name in ones.each("name") if name != FULL]

    def least(name: str) -> float:
        own = ones.of(name=name)
        return min(own.of(guidance_scale=scale).mean("gap_closed") for scale in own.each("guidance_scale"))

    return max(names, key=least)


def by_scale(rows: Rows, key: str, form: str = ".3f") -> str:
    return ", ".join(
        f"{rows.of(guidance_scale=scale).told(key, form)} at {scale:g}" for scale in rows.each("guidance_scale")
    )


def closes_the_gap(rows: Rows) -> Claim:
    name = best_adapter(rows)
    own = rows.of(method=ONE_PASS, name=name)
    least = min(own.of(guidance_scale=scale).mean("gap_closed") for scale in own.each("guidance_scale"))
    return Claim(
        "One pass is what two passes are", f"the best adapter closes at least {GAP_GOAL} of the gap at each scale",
        f"{name}: {by_scale(own, 'gap_closed')}", least >= GAP_GOAL,
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
    best = min(ones.of(guidance_scale=scale).mean("frechet_distance") for scale in ones.each("guidance_scale"))
    least = min(row["frechet_distance"] for row in guided.rows)
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


def compared(rows: Rows, text: str, ours: str, other: str, slack: float = 0.0) -> Claim:
    """Whether one adapter closes as much of the gap as another, over all scales."""
    one, two = (rows.of(method=ONE_PASS, name=name) for name in (ours, other))
    return Claim(
        text, f"{ours} closes more of the gap than {other}" if not slack else f"{ours} closes what {other} does, but for {slack}",
        f"{ours}: {one.mean('gap_closed'):.3f}, Frechet distance {one.mean('frechet_distance'):.1f}; {other}: "
        f"{two.mean('gap_closed'):.3f}, {two.mean('frechet_distance'):.1f} (means over scales and seeds)",
        one.mean("gap_closed") > two.mean("gap_closed") - slack,
    )  # fmt: skip


def guided_trajectories_are_better(rows: Rows) -> Claim:
    text = "Guided trajectories are better to train on than diffusion trajectories"
    return compared(rows, text, "guided", "diffusion")


def a_frozen_base_is_enough(rows: Rows) -> Claim:
    claim = compared(rows, "A frozen base with an adapter does what training every weight does", DEFAULT, FULL, 0.01)
    told = []
    for name in (DEFAULT, FULL):
        own = rows.of(method=ONE_PASS, name=name)
        megabytes = own.mean("training_peak_memory_bytes") / 1e6
        told.append(
            f"{name}: {own.mean('share'):.1%} of the base, {own.mean('training_seconds'):.0f} s, {megabytes:.0f} MB"
        )
    return claim._replace(found="; ".join([claim.found, *told]))


def a_tenth_of_the_evaluations_is_enough(rows: Rows) -> Claim:
    rows = rows.of(method=ONE_PASS)
    most = rows.of(data="few_long")
    tenth = Rows(
        row
        for row in rows.rows
        if row["data"] != "few_long" and 10 * row["teacher_evaluations"] <= most.mean("teacher_evaluations")
    )
    curve = "; ".join(
        f"{data}: {int(own.mean('teacher_evaluations')):,} evaluations, Frechet distance {own.told('frechet_distance', '.1f')}, "
        f"gap closed {own.told('gap_closed')}"
        for data in rows.each("data") for own in [rows.of(data=data)]
    )  # fmt: skip
    return Claim(
        "Many short, shifted trajectories take a tenth of the teacher's evaluations",
        "with a tenth of them, a Frechet distance not above that of few long ones", curve,
        tenth.mean("frechet_distance") <= most.mean("frechet_distance"),
    )  # fmt: skip


def better_than_the_reference(rows: Rows) -> Claim:
    rows = rows.of(method=ONE_PASS)
    told = "; ".join(
        f"{name}: gap closed {own.told('gap_closed')}, Frechet distance {own.told('frechet_distance', '.1f')}"
        for name in rows.each("name") for own in [rows.of(name=name)]
    )  # fmt: skip
    others = [rows.of(name=name).mean("gap_closed") for name in rows.each("name") if name != DEFAULT]
    return Claim(
        "The default is better than the reference recipe on the same teacher", "closes more of the gap than each of its adapters",
        told, rows.of(name=DEFAULT).mean("gap_closed") > max(others),
    )  # fmt: skip


def holds_elsewhere(text: str) -> Callable[[Rows], Claim]:
    """Whether the default closes most of the gap where it was not trained."""

    def claim(rows: Rows) -> Claim:
        own = rows.of(method=ONE_PASS)
        least = min(own.of(guidance_scale=scale).mean("gap_closed") for scale in own.each("guidance_scale"))
        return Claim(
            text, f"closes at least {ELSEWHERE_GOAL} of the gap at each scale",
            f"{by_scale(own, 'gap_closed')}; Frechet distance {by_scale(own, 'frechet_distance', '.1f')}; "
            f"CFG {by_scale(rows.of(method=CFG), 'frechet_distance', '.1f')}",
            least >= ELSEWHERE_GOAL,
        )  # fmt: skip

    return claim


def prompts_are_met(rows: Rows) -> Claim:
    told, holds = [], True
    for key in ("class_accuracy", "stroke_accuracy", "slant_accuracy"):
        none, cfg, one = (rows.of(method=method).mean(key) for method in (NONE, CFG, ONE_PASS))
        told.append(f"{key.replace('_', ' ')}: one pass {one:.3f}, CFG {cfg:.3f}, none {none:.3f}")
        holds &= one >= cfg - ADHERENCE_GOAL
    return Claim(
        "Prompts are met as under CFG",
        f"class, stroke and slant within {ADHERENCE_GOAL} of CFG's",
        "; ".join(told),
        holds,
    )


CLAIMS: dict[str, list[Callable[[Rows], Claim]]] = {
    "scales": [
        closes_the_gap,
        as_good_at_each_scale,
        as_good_at_its_best,
        beats_the_free_alternative,
        a_frozen_base_is_enough,
    ],
    "trajectories": [guided_trajectories_are_better],
    "data_cost": [a_tenth_of_the_evaluations_is_enough],
    "reference": [better_than_the_reference],
    "outside": [holds_elsewhere("It goes on outside the scales of its training")],
    "other_sampler": [holds_elsewhere("It does not depend on the sampler of its training")],
    "fewer_steps": [holds_elsewhere("It does not depend on the number of steps")],
    "checkpoint": [holds_elsewhere("It moves to a fine-tuned checkpoint of the same base")],
    "text": [prompts_are_met],
}
