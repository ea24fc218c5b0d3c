from __future__ import annotations

from typing import Any

import pytest

from stages.evaluate.comparisons import CFG, CFG_FIRST_50, NONE, ONE_PASS
from stages.study.claims import CLAIMS, FULL, Claim, Rows, best_adapter, judge

SCALES = (1.5, 3.0)


def row(method: str, scale: float, gap: float, distance: float, name: str | None = None, **info: Any) -> dict[str, Any]:
    cost = {"training_peak_memory_bytes": 1e9, "training_seconds": 60.0, "share": 0.1, "teacher_evaluations": 1000}
    row = {"evaluation": "scales", "method": method, "guidance_scale": scale, "gap_closed": gap, "name": name}
    return row | {"frechet_distance": distance, "seed": None} | (cost if name else {}) | info


def study(
    default: float = 0.98, full: float = 0.985, distance: float = 20.0, partial: float = 0.8
) -> list[dict[str, Any]]:
    """CFG has a distance of 20 at each scale; `lora` is the same as the default but for one bad scale."""
    rows = [row(NONE, 1.0, 0.0, 50.0)]
    for scale in SCALES:
        rows += [row(CFG, scale, 1.0, 20.0), row(CFG_FIRST_50, scale, partial, 25.0)]
        rows += [
            row(ONE_PASS, scale, default + step, distance, "default", seed=seed)
            for seed, step in ((0, -0.005), (1, 0.005))
        ]
        rows += [
            row(ONE_PASS, scale, full, 20.0, "full"),
            row(ONE_PASS, scale, 1.0 if scale == 3 else 0.5, 20.0, "lora"),
        ]
    return rows


def test_the_best_adapter_is_the_one_that_is_good_at_every_scale() -> None:
    assert best_adapter(Rows(study())) == "default"
    assert best_adapter(Rows(study(default=0.4))) == "lora"


@pytest.mark.parametrize(
    ("changes", "holding"),
    [
        ({}, [True, True, True, True, True]),
        ({"default": 0.96, "full": 0.96}, [False, True, True, True, True]),
        ({"distance": 20.5}, [True, True, False, True, True]),
        ({"distance": 20.7}, [True, False, False, True, True]),
        ({"partial": 0.99}, [True, True, True, False, True]),
        ({"full": 1.0}, [True, True, True, True, False]),
    ],
)
def test_each_claim_holds_or_does_not(changes: dict[str, float], holding: list[bool]) -> None:
    claims = judge(study(**changes))
    assert [claim.holds for claim in claims] == holding


def test_what_was_found_tells_the_mean_and_the_spread_of_the_seeds() -> None:
    claim = judge(study())[0]
    assert claim.found == "default: 0.980 ± 0.005 at 1.5, 0.980 ± 0.005 at 3"


def test_the_spread_is_of_seeds_and_not_of_scales() -> None:
    gaps = {(1.5, 0): 0.8, (3.0, 0): 0.9, (1.5, 1): 0.82, (3.0, 1): 0.92}
    rows = Rows(row(ONE_PASS, scale, gap, 20.0, "lora", seed=seed) for (scale, seed), gap in gaps.items())
    assert rows.info("gap_closed") == "0.860 ± 0.010"
    assert rows.of(seed=0).info("gap_closed") == "0.850"


def test_a_tenth_of_the_evaluations_is_judged_by_what_was_spent() -> None:
    def rows(distance: float) -> list[dict[str, Any]]:
        spent = (("few_long", 80_000, 24.0), ("many_short", 80_000, 20.0), ("many_short_tenth", 8_000, distance))
        return [
            row(ONE_PASS, 2.0, 0.9, d, data, evaluation="data_cost", data=data, teacher_evaluations=evaluations)
            for data, evaluations, d in spent
        ]

    (better,), (worse,) = judge(rows(23.0)), judge(rows(25.0))
    assert (better.holds, worse.holds) == (True, False)
    assert "many_short_tenth: 8,000 evaluations, Frechet distance 23.0" in better.found


def test_a_comparison_takes_the_side_that_closes_more() -> None:
    def rows(guided: float) -> list[dict[str, Any]]:
        info = {"evaluation": "trajectories"}
        return [row(ONE_PASS, 2.0, guided, 20.0, "guided", **info), row(ONE_PASS, 2.0, 0.8, 21.0, "diffusion", **info)]

    assert [claim.holds for claim in judge(rows(0.9)) + judge(rows(0.7))] == [True, False]
    assert judge(rows(0.9)[:1]) == []


def test_the_reference_recipe_is_every_adapter_that_is_named_so() -> None:
    def rows(theirs: float) -> list[dict[str, Any]]:
        gaps = {"lora": 0.97, "reference_offset": 0.3, "reference_cross_attention": theirs}
        return [row(ONE_PASS, 2.0, gap, 20.0, name, evaluation="reference") for name, gap in gaps.items()]

    assert [claim.holds for claim in judge(rows(0.4)) + judge(rows(0.98))] == [True, False]
    assert judge(rows(0.4)[:1]) == []


@pytest.mark.parametrize(("gap", "holds"), [(0.95, True), (0.85, False)])
@pytest.mark.parametrize("evaluation", ["outside", "other_sampler", "fewer_steps", "checkpoint"])
def test_elsewhere_the_least_gap_counts(evaluation: str, gap: float, holds: bool) -> None:
    rows = [row(CFG, s, 1.0, 20.0, evaluation=evaluation) for s in SCALES]
    rows += [row(ONE_PASS, s, gap if s == 3 else 0.99, 21.0, "default", evaluation=evaluation) for s in SCALES]
    (claim,) = judge(rows)
    assert claim.holds is holds


@pytest.mark.parametrize("evaluation", ["text", "text_lora"])
@pytest.mark.parametrize(("one_pass", "holds"), [(0.975, True), (0.965, False)])
def test_prompts_are_met_within_a_hundredth(one_pass: float, holds: bool, evaluation: str) -> None:
    def info(class_accuracy: float) -> dict[str, Any]:
        return {
            "evaluation": evaluation,
            "class_accuracy": class_accuracy,
            "stroke_accuracy": 0.9,
            "slant_accuracy": 0.9,
        }

    rows = [
        row(NONE, 1.0, 0, 50.0, **info(0.8)),
        row(CFG, 2.0, 1, 20.0, **info(0.98)),
        row(ONE_PASS, 2.0, 0.9, 20.0, "text", **info(one_pass)),
    ]
    (claim,) = judge(rows)
    assert claim.holds is holds


def test_what_a_study_has_no_rows_for_is_left_out() -> None:
    assert judge([]) == []
    assert [claim.text[:8] for claim in judge([r for r in study() if r["method"] != CFG_FIRST_50 and r["name"] != FULL])] == [
        "One pass", "Its imag", "At its b"
    ]  # fmt: skip
    assert all(isinstance(claim, Claim) for claim in judge(study()))


@pytest.mark.parametrize("evaluation", list(CLAIMS))
@pytest.mark.parametrize("methods", [{NONE}, {NONE, CFG, CFG_FIRST_50}])
def test_no_claim_is_judged_without_an_adapter(evaluation: str, methods: set[str]) -> None:
    assert judge([row | {"evaluation": evaluation} for row in study() if row["method"] in methods]) == []


def test_every_weight_alone_says_nothing_of_a_frozen_base() -> None:
    assert judge([row for row in study() if row["name"] in (None, FULL)]) == []


@pytest.mark.parametrize("evaluation", list(CLAIMS))
def test_without_reference_images_what_needs_none_is_judged(evaluation: str) -> None:
    rows = [row | {"evaluation": evaluation, "data": "few_long"} for row in study()]
    for row in rows:
        del row["frechet_distance"]
    judged = [claim.text for claim in judge(rows)]
    expected = [
        "One pass is what two passes are",
        "It beats CFG on the first half of the steps, at two thirds of its cost",
    ]
    assert judged == (expected if evaluation == "scales" else [])
