from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from stages.evaluate.pareto import QUALITIES, Pareto, cells, paretos_of, plot, sentences


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


DISTANCE, GAP = QUALITIES


def test_each_method_is_taken_at_its_best_scale() -> None:
    pareto = Pareto.of(ROWS, DISTANCE)
    assert [(p.method, p.scale, p.evaluations, p.quality, p.adherence) for p in pareto.points] == [
        ("none", 1.0, 20, 15.0, 0.9),
        ("cfg", 1.5, 40, 11.0, 0.9),
        ("one_pass", 1.5, 20, 12.0, 0.9),
        ("cfg_first_50", 3.0, 30, 12.5, 0.9),
        ("cfg_interval_20_80", 3.0, 32, 10.5, 0.95),
    ]
    assert [point.method for point in pareto.front] == ["one_pass", "cfg_interval_20_80"]


def test_the_gap_is_averaged_over_the_scales() -> None:
    pareto = Pareto.of(ROWS, GAP)
    assert pareto.adherence is None
    assert (pareto.points[2].quality, pareto.points[2].scale) == (pytest.approx(0.87), None)
    assert [point.method for point in pareto.front] == ["one_pass", "cfg_first_50", "cfg_interval_20_80"]


def test_the_report_says_where_an_alternative_beats_one_pass_and_where_not() -> None:
    front, better, cfg, beaten = Pareto.of(ROWS, DISTANCE).sentences()
    assert front.endswith(
        "one pass (12.00 at scale 1.5 with 20 evaluations); guided, 20% to 80% (10.50 at scale 3 with 32 evaluations)."
    )
    assert better == (
        "With a lower Frechet distance than one pass (12.00 at scale 1.5 with 20 evaluations), at their own cost: "
        "guided, 20% to 80% (10.50 at scale 3 with 32 evaluations)."
    )
    assert cfg == "CFG at all steps has a lower Frechet distance: 11.00 at scale 1.5 with 40 evaluations."
    assert "without a lower Frechet distance: guided, first 50% (12.50" in beaten
    without = [each for each in ROWS if "interval" not in each["method"]]
    (_, none_better, *_) = Pareto.of(without, DISTANCE).sentences()
    expected = "None of the methods that guide at some steps only has a lower Frechet distance than one pass (12.00"
    assert none_better.startswith(expected)
    alone = [each for each in ROWS if each["method"] in ("none", "cfg", "one_pass")]
    assert not any("some steps" in sentence for sentence in Pareto.of(alone, DISTANCE).sentences())
    assert len(Pareto.of([each for each in ROWS if each["method"] != "one_pass"], DISTANCE).sentences()) == 1
    found = sentences(ROWS, 1000)
    assert found[:4] == [front, better, cfg, beaten]
    assert "guided, first 50% (0.873 with 30 evaluations)" in found[5]
    assert found[-1].startswith("These are figures of 1,000 images a row from one set of noise: ")


def test_the_table_names_the_fronts() -> None:
    found = cells(ROWS)
    head = ["method", "evaluations", "Frechet distance", "at scale", "class accuracy", "gap closed", "on the front of"]
    assert found[0] == head
    assert found[-2] == ["guided, 20% to 80%", "32", "10.50", "3", "0.950", "0.890", "Frechet distance, gap closed"]
    assert found[3] == ["guided, first 50%", "30", "12.50", "3", "0.900", "0.873", "gap closed"]
    assert {len(line) for line in found} == {len(head)}


def test_without_a_gap_to_close_there_is_no_figure_of_it() -> None:
    rows = [each | ({"gap_closed": None} if "first" in each["method"] else {}) for each in ROWS]
    assert cells(rows)[3] == ["guided, first 50%", "30", "12.50", "3", "0.900", "none", ""]
    assert [point.method for point in Pareto.of(rows, GAP).front] == ["one_pass", "cfg_interval_20_80"]
    assert plot(rows)


def test_without_a_reference_there_is_the_gap_alone() -> None:
    rows = [
        {key: value for key, value in each.items() if key not in ("frechet_distance", "class_accuracy")}
        for each in ROWS
    ]
    assert [pareto.quality for pareto in paretos_of(rows)] == [GAP]
    assert cells(rows)[0] == ["method", "evaluations", "gap closed", "on the front of"]


@pytest.mark.parametrize(
    ("left_out", "panels"), [(set(), 3), ({"class_accuracy"}, 2), ({"class_accuracy", "frechet_distance"}, 1)]
)
def test_the_plot_has_a_panel_for_each_measure(left_out: set[str], panels: int) -> None:
    rows = [{key: value for key, value in each.items() if key not in left_out} for each in ROWS]
    with Image.open(io.BytesIO(plot(rows))) as picture:
        assert picture.width == round((2.2 + 3.7 * panels) * 120)
