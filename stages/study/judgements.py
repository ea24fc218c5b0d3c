"""The judgements that a study's file names for its claims, each by the rows of one evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from stages.evaluate.methods import CFG, CFG_FIRST_50, NONE
from stages.study.rows import (
    Rows,
    below_cfgs_best_scale,
    best_adapter,
    cfg_at,
    cfgs_best_scale,
    measured_accuracies,
    words,
)


class Finding(NamedTuple):
    """What a judgement asks for, the figures that it found, and whether they reach the goal."""

    goal: str
    found: str
    holds: bool


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


def keeps_gap(rows: Rows, adapters: list[str], home: Rows, threshold: float) -> Finding:
    """Where sampling differs from training, the adapter closes that share of what it closes at home, at each scale.

    An adapter that closes nothing at home has nothing to keep.
    """
    name = best_adapter(rows, adapters)
    own, at_home = rows.named([name]), home.named([name])
    shares = ratios_by_scale("gap_closed", own, at_home)
    return Finding(
        f"at each scale, closes at least {threshold} of the share of the gap that it closes at home",
        f"{name}: {own.by_scale('gap_closed')}; over home: {listed(shares, threshold)}; "
        f"Frechet distance {own.by_scale('frechet_distance', '.1f')}; "
        f"CFG {rows.where(method=CFG).by_scale('frechet_distance', '.1f')}",
        all(share >= threshold for share in shares.values()),
    )


def ratios_by_scale(key: str, rows: Rows, others: Rows) -> dict[float, float]:
    """The mean of a column over that of other rows, at each scale; NaN, which meets no goal, over 0 or less.

    Raises:
        MissingRowsError: there are no rows.
    """
    scales = rows.unique("guidance_scale")
    means = {s: (rows.where(guidance_scale=s).mean(key), others.where(guidance_scale=s).mean(key)) for s in scales}
    return {scale: own / other if other > 0 else math.nan for scale, (own, other) in means.items()}


def listed(by_scale: dict[float, float], goal: float) -> str:
    return ", ".join(f"{figure(value, goal)} at {scale:g}" for scale, value in by_scale.items())


def figure(value: float, goal: float) -> str:
    """A figure in three digits, or in as many as tell it from the goal."""
    texts = [f"{value:.{digits}f}" for digits in range(3, 8)]
    return next((text for text in texts if float(text) != goal), texts[0])


def frechet_at_each_scale(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """The Frechet distance is at most CFG's times the threshold, at each scale."""
    name = best_adapter(rows, adapters)
    own, cfg = rows.named([name]), rows.where(method=CFG)
    ratios = ratios_by_scale("frechet_distance", own, cfg)
    return Finding(
        f"Frechet distance at most CFG's times {threshold}",
        f"{name}: {own.by_scale('frechet_distance', '.1f')}; over CFG: {listed(ratios, threshold)}",
        all(ratio <= threshold for ratio in ratios.values()),
    )


def frechet_at_best_scale(rows: Rows, adapters: list[str]) -> Finding:
    """The least Frechet distance over the scales is at most CFG's."""
    name = best_adapter(rows, adapters)
    own = rows.named([name]).least_over_scales("frechet_distance")
    cfg = rows.where(method=CFG).least_over_scales("frechet_distance")
    return Finding(
        "the least Frechet distance over the scales is not above CFG's", f"{name} {own:.1f}, CFG {cfg:.1f}", own <= cfg
    )


def frechet_at_cfgs_best_scale(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """At the scale where CFG's Frechet distance is least, the adapter's is at most that times the threshold."""
    name, scale = best_adapter(rows, adapters), cfgs_best_scale(rows)
    key, at_best = "frechet_distance", rows.where(guidance_scale=scale)
    own, cfg = at_best.named([name]), at_best.where(method=CFG).mean(key)
    ratio = own.mean(key) / cfg
    return Finding(
        f"at CFG's best scale, Frechet distance at most CFG's times {threshold}",
        f"{name}: {own.format(key, '.1f')} at {scale:g}, CFG {cfg:.1f}; over CFG: {figure(ratio, threshold)}",
        ratio <= threshold,
    )


def frechet_at_effective_scale(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """The Frechet distance is at most the threshold times that of CFG at the adapter's effective scale.

    The effective scale must reach CFG's best scale: without guidance the two distances are the same.
    """
    name, key = best_adapter(rows, adapters), "frechet_distance"
    figures, ratios, too_low = [], [], below_cfgs_best_scale(rows, name)
    for scale in rows.named([name]).unique("guidance_scale"):
        own = rows.named([name]).where(guidance_scale=scale)
        effective = own.mean("effective_scale")
        cfg = cfg_at(rows, key, effective)
        ratios.append(own.mean(key) / cfg)
        figures.append(f"{own.format(key, '.1f')} at {scale:g}, CFG {cfg:.1f} at {effective:.2f}")
    return Finding(
        f"at each scale, Frechet distance at most {threshold} times that of CFG at the effective scale, "
        "which reaches CFG's best scale",
        f"{name}: {'; '.join(figures)}; over CFG: at most {figure(max(ratios), threshold)}{too_low}",
        all(ratio <= threshold for ratio in ratios) and not too_low,
    )


def time_over_cfg(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """A fused pass takes at most that share of CFG's time, at each scale, measured in the same evaluation."""
    name = best_adapter(rows, adapters)
    own, cfg = rows.named([name]), rows.where(method=CFG)
    ratios = ratios_by_scale("time_relative_to_none", own, cfg)
    fused = all(row.get("fused") for row in own.rows)
    return Finding(
        f"fused, it takes at most {threshold} of CFG's time at each scale",
        f"{name}: {listed(ratios, threshold)}{'' if fused else '; not fused'}",
        fused and all(ratio <= threshold for ratio in ratios.values()),
    )


def share_of_parameters(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """The adapter has at most that share of the base's parameters."""
    name = best_adapter(rows, adapters)
    own = rows.named([name])
    share = own.mean("share")
    return Finding(
        f"at most {threshold:.1%} of the base's parameters",
        f"{name}: {share:.2%}",
        share <= threshold,
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
    """Each seed of the adapter closes more of the gap than each of the others; the figures include the evaluations."""
    name = best_adapter(rows, adapters)
    names = [name, *against]
    gaps = {each: rows.named([each]).by_seed("gap_closed") for each in names}
    costs = [f"{each}: {rows.named([each]).mean('teacher_evaluations'):,.0f} evaluations" for each in names]
    return Finding(
        f"{name} closes more of the gap than {' and '.join(against)}, with every seed",
        "; ".join([*map(rows.quality, names), *costs]),
        all(min(gaps[name]) > max(gaps[other]) for other in against),
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


def meets_prompts(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """Images show what their prompts ask for as often as under CFG, up to the threshold, over all scales."""
    own, cfg, none = rows.named([best_adapter(rows, adapters)]), rows.where(method=CFG), rows.where(method=NONE)
    keys = measured_accuracies(rows)
    figures = [
        f"{key.replace('_', ' ')}: one pass {own.format(key)}, CFG {cfg.mean(key):.3f}, none {none.mean(key):.3f}"
        for key in keys
    ]
    return Finding(
        f"{', '.join(map(words, keys))} within {threshold} of CFG's",
        "; ".join([*figures, f"gap closed {own.format('gap_closed')}"]),
        all(own.mean(key) >= cfg.mean(key) - threshold for key in keys),
    )


def prompts_at_cfgs_best_scale(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """As `meets_prompts`, at the scale where CFG's Frechet distance is least."""
    name, scale, keys = best_adapter(rows, adapters), cfgs_best_scale(rows), measured_accuracies(rows)
    own, cfg = rows.named([name]).where(guidance_scale=scale), rows.where(method=CFG, guidance_scale=scale)
    figures = [f"{words(key)}: one pass {own.format(key)}, CFG {cfg.mean(key):.3f}" for key in keys]
    return Finding(
        f"at CFG's best scale, {', '.join(map(words, keys))} within {threshold} of CFG's",
        f"at {scale:g}: {'; '.join(figures)}",
        all(own.mean(key) >= cfg.mean(key) - threshold for key in keys),
    )


def prompts_at_effective_scale(rows: Rows, adapters: list[str], threshold: float) -> Finding:
    """As `meets_prompts`, against CFG at the adapter's effective scale, which must reach CFG's best scale."""
    name, keys = best_adapter(rows, adapters), measured_accuracies(rows)
    figures, too_low = [], below_cfgs_best_scale(rows, name)
    holds = not too_low
    for scale in rows.named([name]).unique("guidance_scale"):
        own = rows.named([name]).where(guidance_scale=scale)
        effective = own.mean("effective_scale")
        cfg = {key: cfg_at(rows, key, effective) for key in keys}
        holds = holds and all(own.mean(key) >= cfg[key] - threshold for key in keys)
        each = [f"{words(key)} {own.format(key)}, CFG {cfg[key]:.3f}" for key in keys]
        figures.append(f"at {scale:g} (CFG at {effective:.2f}): {', '.join(each)}")
    return Finding(
        f"at each scale, {', '.join(map(words, keys))} within {threshold} of CFG's at the effective scale, "
        "which reaches CFG's best scale",
        f"{'; '.join(figures)}{too_low}",
        holds,
    )


def heeds_negative_prompts(rows: Rows, adapters: list[str], against: list[str], threshold: float) -> Finding:
    """With negative prompts, images show what their prompts ask for as often as under CFG, up to the threshold.

    A negative prompt can lower that as well, so more often is no better. The adapter also comes nearer to CFG's latents
    than those that do not see the negative prompts.
    """
    name, cfg, keys = best_adapter(rows, adapters), rows.where(method=CFG), measured_accuracies(rows)
    own = rows.named([name])
    gap = {each: rows.named([each]).mean("gap_closed") for each in (name, *against)}
    figures = []
    for key in keys:
        blind = [f"{other} {rows.named([other]).format(key)}" for other in against]
        figures.append(f"{words(key)}: {name} {own.format(key)}, CFG {cfg.mean(key):.3f}, {', '.join(blind)}")
    closed = ", ".join(f"{each} {rows.named([each]).format('gap_closed')}" for each in gap)
    return Finding(
        f"{', '.join(map(words, keys))} within {threshold} of CFG's, and more of the gap closed than "
        f"{' and '.join(against)}",
        "; ".join([*figures, f"gap closed: {closed}"]),
        all(abs(own.mean(key) - cfg.mean(key)) <= threshold for key in keys)
        and all(gap[name] > gap[other] for other in against),
    )


JUDGEMENTS: dict[str, Callable[..., Finding]] = {
    function.__name__: function
    for function in (
        closes_gap,
        closes_gap_elsewhere,
        keeps_gap,
        frechet_at_each_scale,
        frechet_at_best_scale,
        frechet_at_cfgs_best_scale,
        frechet_at_effective_scale,
        time_over_cfg,
        share_of_parameters,
        beats_partial_guidance,
        matches,
        outperforms,
        needs_a_tenth,
        meets_prompts,
        prompts_at_cfgs_best_scale,
        prompts_at_effective_scale,
        heeds_negative_prompts,
    )
}
