from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.sample
from stages.adapters import GuidanceAdapter
from stages.app.sampler import SIDE, Sampler, Subject
from stages.base.loading import load_pipeline
from stages.errors import UserError
from stages.evaluate.comparisons import Setting, load_pair, settings
from stages.evaluate.config import SampleConfig
from stages.evaluate.methods import CFG, NONE, ONE_PASS
from tests.pipelines_zoo.gathered import gather
from tests.support.families import PROMPTS, build

STEPS = 4


@pytest.fixture(scope="module")
def sampler(tiny_adapter: Path) -> Sampler:
    return Sampler(*load_pair(str(tiny_adapter), None, "cpu"), STEPS)


def pixels(sampler: Sampler, setting: Setting, subject: Subject) -> Any:
    return np.asarray(sampler.sample(setting, subject).sheet)


def test_one_pass_takes_as_many_evaluations_as_no_guidance_and_cfg_twice_as_many(sampler: Sampler) -> None:
    samples = {setting.method: sampler.sample(setting, Subject(3, 0)) for setting in settings([2.0])}
    evaluations = {method: sample.denoiser_evaluations for method, sample in samples.items()}
    assert evaluations == {NONE: STEPS, CFG: 2 * STEPS, ONE_PASS: STEPS}
    assert all(sample.milliseconds > 0 for sample in samples.values())
    assert (samples[CFG].fused, samples[ONE_PASS].fused) == (None, True)


def test_small_pictures_are_nine_at_once_and_large_ones_alone(sampler: Sampler) -> None:
    sheet = sampler.sample(Setting(NONE, 1.0), Subject(3, 0)).sheet
    assert sampler.side == SIDE
    assert sheet.width % (32 * SIDE) == 0


def test_scale_class_and_seed_change_the_pictures(sampler: Sampler) -> None:
    before = pixels(sampler, Setting(ONE_PASS, 2.0), Subject(3, 0))
    assert np.array_equal(before, pixels(sampler, Setting(ONE_PASS, 2.0), Subject(3, 0)))
    for setting, subject in (
        (Setting(ONE_PASS, 3.0), Subject(3, 0)),
        (Setting(ONE_PASS, 2.0), Subject(4, 0)),
        (Setting(ONE_PASS, 2.0), Subject(3, 1)),
    ):
        assert not np.array_equal(before, pixels(sampler, setting, subject))


def test_the_first_picture_is_that_of_the_command_sample(sampler: Sampler, tiny_adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    config = SampleConfig(
        str(tiny_adapter), [3], guidance_scale=2.0, output=str(path), seed=5, num_inference_steps=STEPS
    )
    pipeline.sample.main(config)
    grid = np.asarray(Image.open(path).convert("RGB"))
    sheet = np.asarray(sampler.sample(Setting(ONE_PASS, 2.0), Subject(3, 5)).sheet.convert("RGB"))
    size = grid.shape[1]
    assert np.abs(grid[2 * size :].astype(int) - sheet[:size, :size].astype(int)).max() <= 1  # of a larger batch


def test_threads_take_turns(sampler: Sampler) -> None:
    asked = [(Setting(method, scale), Subject(3, 7)) for scale in (2.0, 3.0) for method in (CFG, ONE_PASS)] * 2
    alone = [pixels(sampler, *one) for one in asked]
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(lambda one: pixels(sampler, *one), asked))
    assert all(np.array_equal(*pair) for pair in zip(alone, at_once, strict=True))


def test_classes_have_the_names_that_the_pipeline_gives_them(tiny_adapter: Path) -> None:
    pipe, adapter = load_pair(str(tiny_adapter), None, "cpu")
    pipe.labels = {"tench": 0, "Tinca tinca": 0, "goldfish": 1}
    names = Sampler(pipe, adapter, 2).classes
    assert names is not None
    assert names[:3] == [("tench, Tinca tinca", 0), ("goldfish", 1), ("2", 2)]


class Unguided(torch.nn.Module):
    """Stands in for an adapter where only no guidance is sampled."""

    def __init__(self, metadata: Any) -> None:
        super().__init__()
        self.metadata = metadata


def test_prompts_and_negative_prompts_reach_the_pipeline(tiny_adapter: Path) -> None:
    adapter: Any = Unguided(GuidanceAdapter.from_pretrained(tiny_adapter).metadata)
    sampler = Sampler(build("stable_diffusion"), adapter, 2)
    assert sampler.classes is None
    assert sampler.takes_negative
    guided = Setting(CFG, 3.0)
    plain = pixels(sampler, guided, Subject(PROMPTS[0], 0))
    assert not np.array_equal(plain, pixels(sampler, guided, Subject(PROMPTS[1], 0)))
    assert not np.array_equal(plain, pixels(sampler, guided, Subject(PROMPTS[0], 0, PROMPTS[1])))


def test_a_pipeline_that_needs_pictures_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = gather()["StableDiffusionInstructPix2PixPipeline"].save(tmp_path)
    adapter: Any = Unguided(GuidanceAdapter.from_pretrained(tiny_adapter).metadata)
    with pytest.raises(
        UserError, match="cannot be sampled from a prompt alone .*pipeline.sample prompts=... image=..."
    ):
        Sampler(load_pipeline(str(folder), device="cpu"), adapter, 2)
