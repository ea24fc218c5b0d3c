from __future__ import annotations

from typing import Any

import gradio as gr
import pytest
from PIL import Image

from stages.app.page import Scales, check_seed, drawn, figure, marks
from stages.app.sampler import Sample, Subject
from stages.errors import UserError
from stages.evaluate.comparisons import Setting
from stages.evaluate.methods import CFG, NONE, ONE_PASS


@pytest.mark.parametrize("trained", [(1.0, 4.0), (1.0, 1.5), (2.0, 14.0), (1.0, 30.0)])
def test_the_slider_reaches_from_just_above_no_guidance_to_beyond_the_trained_scales(
    trained: tuple[float, float],
) -> None:
    scales = Scales.around(*trained)
    assert 1 < scales.lowest <= scales.first <= scales.highest
    assert trained[0] <= scales.first <= trained[1]
    assert trained[1] < scales.highest < 1.5 * trained[1]
    positions = (scales.highest - scales.lowest) / scales.step
    assert positions == pytest.approx(round(positions))
    assert 10 < positions <= 60
    assert scales.share(scales.lowest) == 0
    assert scales.share(scales.highest) == 1


@pytest.mark.parametrize("trained", [(1.0, 1.004), (1.2, 1.2), (3.33, 3.33), (7.5, 7.5), (4.0, 4.02), (1.0, 1.0)])
def test_a_slider_of_near_scales_begins_at_a_trained_one(trained: tuple[float, float]) -> None:
    scales = Scales.around(*trained)
    assert 1 < scales.lowest <= scales.first <= scales.highest
    assert scales.lowest < scales.highest
    assert scales.note(scales.first) == "" or trained == (1.0, 1.0)


def test_the_band_of_the_trained_scales_reaches_the_sliders_end() -> None:
    assert "--trained-from: -1.000" in marks(Scales.around(1.0, 4.0))
    assert "--trained-from: 0." in marks(Scales.around(2.0, 4.0))
    assert Scales.around(3.0, 3.0).trained_in_words == "3"


def test_a_seed_out_of_bounds_is_told_on_the_page() -> None:
    check_seed(0)
    for seed in (-1, 2**31):
        with pytest.raises(gr.Error, match=f"seed {seed}: 0 to 2147483647") as raised:
            check_seed(seed)
        assert not raised.value.print_exception


def test_scales_outside_the_trained_ones_are_noted() -> None:
    scales = Scales.around(2.0, 4.0)
    assert scales.note(2.0) == scales.note(4.0) == ""
    assert "4.1 is outside the trained scales, 2 to 4" in scales.note(4.1)
    assert "1.5 is outside" in scales.note(1.5)


def test_a_figure_shows_pictures_and_cost() -> None:
    shown = figure(ONE_PASS, Sample(Image.new("L", (96, 96)), 25, 41.4, fused=True))
    for part in (">one pass, fused<", ">25</b> evaluations", ">41</b> ms", 'class="small"', "data:image/png;base64,"):
        assert part in shown
    assert 'class="large"' in figure(CFG, Sample(Image.new("RGB", (1024, 1024)), 50, 900.0, fused=None))
    assert "<img" not in figure(CFG, None)


class Recorded:
    """A sampler that keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Setting] = []

    def sample(self, setting: Setting, subject: Subject) -> Sample:
        if subject.shown == "refused":
            raise UserError("refused: ask for something else")
        self.asked.append(setting)
        return Sample(Image.new("L", (8, 8)), 25, 1.0, fused=None)


def test_each_sample_is_shown_at_once_and_cfg_comes_last() -> None:
    sampler: Any = Recorded()
    outputs = list(drawn(sampler, Scales.around(1.0, 4.0), 3.0, Subject(1, 0)))
    assert sampler.asked == [Setting(NONE, 1.0), Setting(ONE_PASS, 3.0), Setting(CFG, 3.0)]
    assert [["<img" in str(figure) for figure in shown[:3]] for shown in outputs] == [
        [True, False, False],
        [True, False, True],
        [True, True, True],
    ]
    assert ["sampling" in shown[3] for shown in outputs] == [True, True, False]


def test_what_the_pipeline_refuses_is_told_on_the_page() -> None:
    sampler: Any = Recorded()
    with pytest.raises(gr.Error, match="refused: ask for something else"):
        list(drawn(sampler, Scales.around(1.0, 4.0), 3.0, Subject("refused", 0)))
