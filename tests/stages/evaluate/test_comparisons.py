from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.base.loading import load_pipeline
from stages.base.sampling import Request
from stages.errors import UserError
from stages.evaluate.comparisons import Setting, load_lora, load_pair, sample_setting, settings
from stages.evaluate.conditions import conditions_of
from stages.evaluate.methods import CFG, NONE, ONE_PASS
from tests.conftest import save_pipeline, tiny_dit

CONDITIONS = [{"class_label": 1}, {"class_label": 2}]


def test_no_guidance_once_and_both_ways_at_every_scale() -> None:
    assert settings([2.0, 3.0]) == [
        Setting(NONE, 1.0),
        Setting(CFG, 2.0),
        Setting(ONE_PASS, 2.0),
        Setting(CFG, 3.0),
        Setting(ONE_PASS, 3.0),
    ]
    for scales in ([], [1.0], [2.0, 0.5]):
        with pytest.raises(UserError, match="scales above 1"):
            settings(scales)


def test_methods_start_from_the_same_noise_and_count_their_evaluations(tiny_adapter: Path) -> None:
    pipe, adapter = load_pair(str(tiny_adapter), None, "cpu")
    start = {}
    for setting in settings([3.0]):
        scheduler_step = pipe.scheduler.step
        seen: list[torch.Tensor] = []

        def step(prediction, t, sample, *args, _seen=seen, _step=scheduler_step, **kwargs):  # type: ignore[no-untyped-def]
            _seen.append(sample[:2])
            return _step(prediction, t, sample, *args, **kwargs)

        pipe.scheduler.step = step
        result = sample_setting(pipe, adapter, setting, Request(CONDITIONS, [10, 11], 4, {}))
        del pipe.scheduler.step
        start[setting.method] = seen[0]
        assert result.latents.shape == (2, 4, 8, 8)
        assert result.seconds > 0
        assert result.denoiser_evaluations == {NONE: 8, CFG: 16, ONE_PASS: 8}[setting.method]
    assert torch.equal(start[NONE], start[CFG])
    assert torch.equal(start[NONE], start[ONE_PASS])


def test_one_pass_in_an_interval_costs_one_pass_and_guides_there_only(tiny_adapter: Path) -> None:
    pipe, adapter = load_pair(str(tiny_adapter), None, "cpu")
    request = Request(CONDITIONS, [10, 11], 5, {})
    whole = sample_setting(pipe, adapter, Setting(ONE_PASS, 3.0), request)
    none = sample_setting(pipe, adapter, Setting(NONE, 1.0), request)
    states = [*(step.latents for step in none.steps), none.latents]
    for interval, first in {"0_100": 0, "20_80": 1, "40_60": 2, "50_51": 5}.items():
        found = sample_setting(pipe, adapter, Setting(f"one_pass_interval_{interval}", 3.0), request)
        assert (found.denoiser_evaluations, found.fused) == (10, True)
        same = [
            torch.equal(a, b) for a, b in zip([*(s.latents for s in found.steps), found.latents], states, strict=True)
        ]
        assert same == [number <= first for number in range(6)]
        assert torch.equal(found.latents, whole.latents) == (interval == "0_100")
    assert adapter.denoiser is None


def test_a_base_of_another_architecture_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    pipe = tiny_dit()
    pipe.register_modules(
        transformer=type(pipe.transformer).from_config({**pipe.transformer.config, "attention_head_dim": 12})
    )
    with pytest.raises(UserError, match="does not fit this DiTTransformer2DModel"):
        load_pair(str(tiny_adapter), str(save_pipeline(pipe, tmp_path)), "cpu")


def test_classes_the_adapter_never_saw_are_refused(tiny_adapter: Path) -> None:
    pipe, adapter = load_pair(str(tiny_adapter), None, "cpu")
    assert conditions_of(type(pipe), adapter, [0, 9], []) == [{"class_label": 0}, {"class_label": 9}]
    assert len(conditions_of(type(pipe), adapter, None, [])) == 10
    for labels in ([], [10], [-1]):
        with pytest.raises(UserError, match="trained on: 0 to 9"):
            conditions_of(type(pipe), adapter, labels, [])
    with pytest.raises(UserError, match="DiTPipeline takes classes"):
        conditions_of(type(pipe), adapter, None, ["a cat"])


def test_another_checkpoint_of_the_base_is_accepted(tiny_adapter: Path, other_teacher: Path) -> None:
    pipe, adapter = load_pair(str(tiny_adapter), str(other_teacher), "cpu")
    assert (
        sample_setting(pipe, adapter, Setting(ONE_PASS, 2.0), Request(CONDITIONS[:1], [0], 2, {})).denoiser_evaluations
        == 2
    )


def test_a_lora_that_cannot_be_loaded_is_named(tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DiTPipeline takes no LoRA"):
        load_pair(str(tiny_adapter), None, "cpu", lora=str(tmp_path))
    with pytest.raises(UserError, match=r"lora=.*cannot be loaded"):
        load_lora(load_pipeline("stages/embedded/mnist_sd"), str(tmp_path))


def test_a_lora_is_loaded_without_a_word_and_one_of_another_base_is_refused(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    load_lora(load_pipeline("stages/embedded/emoji"), "stages/embedded/emoji_grey_lora")
    assert capfd.readouterr().err == ""
    assert [str(each.message) for each in recwarn if "PEFT" in str(each.message)] == []
    with pytest.raises(UserError, match="lora=stages/embedded/emoji_grey_lora: "):
        load_lora(load_pipeline("stages/embedded/mnist_sd"), "stages/embedded/emoji_grey_lora")
