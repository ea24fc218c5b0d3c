from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from stages.evaluate.pareto import Pareto


def row(method: str, scale: float, evaluations: float, distance: float, **values: Any) -> dict[str, Any]:
    measured = {"frechet_distance": distance, "class_accuracy": 0.9, "gap_closed": 1 - distance / 100} | values
    return {"method": method, "guidance_scale": scale, "denoiser_evaluations": evaluations, "adapter": None} | measured


ROWS = [
    row("none", 1.0, 20, 15.0),
    row("cfg", 1.5, 40, 11.0),
    row("cfg", 3.0, 40, 16.0),
    row("one_pass", 1.5, 20, 12.0, adapter="mine"),
    row("one_pass", 3.0, 20, 14.0, adapter="mine"),
    row("cfg_first_50", 1.5, 30, 13.0),
    row("cfg_first_50", 3.0, 30, 12.5),
    row("cfg_interval_20_80", 1.5, 32, 11.5),
    row("cfg_interval_20_80", 3.0, 32, 10.5, class_accuracy=0.95),
]


def test_each_method_is_taken_at_its_best_scale() -> None:
    pareto = Pareto.of(ROWS)
    assert [(p.method, p.scale, p.evaluations, p.quality, p.adherence) for p in pareto.points] == [
        ("none", 1.0, 20, 15.0, 0.9),
        ("cfg", 1.5, 40, 11.0, 0.9),
        ("one_pass", 1.5, 20, 12.0, 0.9),
        ("cfg_first_50", 3.0, 30, 12.5, 0.9),
        ("cfg_interval_20_80", 3.0, 32, 10.5, 0.95),
    ]
    assert [point.method for point in pareto.front] == ["one_pass", "cfg_interval_20_80"]
    cells = pareto.cells()
    assert cells[0] == ["method", "evaluations", "Frechet distance", "at scale", "class accuracy", "on the front"]
    assert ["guided, 20% to 80%", "32", "10.50", "3", "0.950", "yes"] in cells
    assert {len(line) for line in cells} == {6}


def test_the_report_says_where_an_alternative_beats_one_pass_and_where_not() -> None:
    front, better, cfg, beaten = Pareto.of(ROWS).sentences()
    assert front.endswith(
        "one pass (12.00 at scale 1.5 with 20 evaluations); guided, 20% to 80% (10.50 at scale 3 with 32 evaluations)."
    )
    assert better == (
        "Better than one pass (12.00 at scale 1.5 with 20 evaluations), at their own cost: "
        "guided, 20% to 80% (10.50 at scale 3 with 32 evaluations)."
    )
    assert cfg == "CFG at all steps is better: 11.00 at scale 1.5 with 40 evaluations."
    assert "no better: guided, first 50% (12.50" in beaten
    without = [each for each in ROWS if "interval" not in each["method"]]
    assert Pareto.of(without).sentences()[1].startswith("No guidance at some steps only is better than one pass (12.00")
    assert len(Pareto.of([each for each in ROWS if each["method"] != "one_pass"]).sentences()) == 1


def test_without_a_reference_the_gap_is_averaged_over_the_scales() -> None:
    rows = [
        {key: value for key, value in each.items() if key not in ("frechet_distance", "class_accuracy")}
        for each in ROWS
    ]
    pareto = Pareto.of(rows)
    assert pareto.quality.name == "gap closed"
    assert pareto.adherence is None
    assert pareto.points[2].quality == pytest.approx(0.87)
    assert [point.method for point in pareto.front] == ["one_pass", "cfg_first_50", "cfg_interval_20_80"]
    assert pareto.cells()[0] == ["method", "evaluations", "gap closed", "on the front"]


@pytest.mark.parametrize("columns", [{}, {"class_accuracy"}, {"class_accuracy", "frechet_distance"}])
def test_the_plot_has_a_panel_for_each_measure(columns: set[str]) -> None:
    rows = [{key: value for key, value in each.items() if key not in columns} for each in ROWS]
    with Image.open(io.BytesIO(Pareto.of(rows).plot())) as picture:
        assert picture.width > (500 if columns else 1000)
