"""The evaluated teacher is the recorded teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPAGPipeline, StableDiffusionPipeline

from stages.adapters import GuidanceAdapter
from stages.adapters.card import loading, model_card
from stages.base.sampling import Request
from stages.errors import UserError
from stages.evaluate.comparisons import Setting, arguments_of, load_pair, sample_setting
from stages.evaluate.methods import CFG, NONE, ONE_PASS
from stages.generate.config import TeacherConfig
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, small_adapter, train_config
from tests.support.families import PROMPTS, save

NEGATIVES = ["grey", "a blurry one leaning left"]


def trained(folder: Path, family: str, **info: Any) -> Path:
    """The folder of an adapter after one training step on such a teacher's records."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = generate_config(save(family, folder / "teacher"), folder / "data", prompts=str(folder / "prompts.txt"))
    config.teacher = TeacherConfig(str(folder / "teacher"), **info)
    config.num_trajectories, config.num_inference_steps = 4, 2
    run = train_config(generate(config), folder / "run", max_train_steps=1, adapter=small_adapter())
    Trainer(run).run()
    return folder / "run"


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("recorded"),
        "stable_diffusion",
        pipeline_class="StableDiffusionPAGPipeline",
        scheduler="DDIMScheduler",
        call={"pag_scale": 2.0, "pag_adaptive_scale": 0.0},
    )


def request_of(pipe: Any, adapter: GuidanceAdapter, steps: int = 2) -> Request:
    return Request([{"prompt": PROMPTS[0]}], [0], steps, arguments_of(pipe, adapter))


def test_class_scheduler_and_arguments_are_those_of_the_records(adapter_dir: Path) -> None:
    pipe, adapter = load_pair(str(adapter_dir), None, "cpu")
    assert type(pipe) is StableDiffusionPAGPipeline
    assert type(pipe.scheduler) is DDIMScheduler
    assert arguments_of(pipe, adapter) == {"pag_scale": 2.0, "pag_adaptive_scale": 0.0}
    passes = {
        method: sample_setting(pipe, adapter, Setting(method, scale), request_of(pipe, adapter)).denoiser_evaluations
        / 2
        for method, scale in ((NONE, 1.0), (CFG, 3.0), (ONE_PASS, 3.0))
    }
    assert passes == {NONE: 1, CFG: 3, ONE_PASS: 1}


def test_a_reconfigured_scheduler_is_restored(adapter_dir: Path, tmp_path: Path) -> None:
    metadata = json.loads((adapter_dir / "adapter_config.json").read_text())
    recorded = dict(load_pair(str(adapter_dir), None, "cpu")[0].scheduler.config)
    assert recorded.items() >= metadata["teacher"]["scheduler_config"].items()
    pipe: Any = StableDiffusionPipeline.from_pretrained(metadata["base"]["pretrained_model_name_or_path"])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, beta_end=0.05)
    pipe.save_pretrained(tmp_path)
    other = load_pair(str(adapter_dir), str(tmp_path), "cpu")[0]
    assert type(other.scheduler) is DDIMScheduler
    assert other.scheduler.config.beta_end == 0.05  # this setting belongs to the other base's weights


def test_the_card_shows_how_to_load_the_teacher(adapter_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card names a teacher that is on no hub by its folder's name."""
    adapter = GuidanceAdapter.from_pretrained(adapter_dir)
    monkeypatch.chdir(Path(adapter.metadata.base.pretrained_model_name_or_path).parent)
    card = model_card(adapter.variant, 1, adapter.metadata)
    assert "| teacher | StableDiffusionPAGPipeline |" in card
    assert "| scheduler | DDIMScheduler |" in card
    assert '"pag_scale": 2.0' in card
    assert "from diffusers import DDIMScheduler, StableDiffusionPAGPipeline" in card
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)" in card
    names: dict[str, Any] = {}
    exec(loading(adapter.metadata), names)
    assert type(names["pipe"]) is StableDiffusionPAGPipeline


def test_a_guider_is_restored(tmp_path: Path) -> None:
    guider = {"name": "AdaptiveProjectedGuidance", "eta": 0.5}
    pipe, adapter = load_pair(str(trained(tmp_path, "stable_diffusion_xl", guider=guider)), None, "cpu")
    assert type(pipe.guider).__name__ == "AdaptiveProjectedGuidance"
    assert pipe.guider.eta == 0.5
    found = {}
    for method, scale in ((NONE, 1.0), (CFG, 3.0), (ONE_PASS, 3.0)):
        found[method] = sample_setting(pipe, adapter, Setting(method, scale), request_of(pipe, adapter))
    assert [samples.denoiser_evaluations for samples in found.values()] == [2, 4, 2]
    with pytest.raises(UserError, match="modular pipeline.*: leave one_pass_interval_20_80 out of methods"):
        sample_setting(pipe, adapter, Setting("one_pass_interval_20_80", 3.0), request_of(pipe, adapter))
    assert "| guider |" in model_card(adapter.variant, 1, adapter.metadata)


def test_a_negative_prompt_moves_cfg_and_one_pass_and_not_the_base(tmp_path: Path) -> None:
    """`lora` sees the negative prompt beside the scale, so its passes are not fused; they stay single."""
    rows = [
        {"prompt": prompt, "negative_prompt": negative} for prompt, negative in zip(PROMPTS, NEGATIVES, strict=True)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    teacher = save("stable_diffusion", tmp_path / "teacher")
    config = generate_config(teacher, tmp_path / "data", prompts=str(prompts), num_trajectories=4)
    seeing = small_adapter(conditions=["negative_tokens"])
    Trainer(train_config(generate(config), tmp_path / "run", max_train_steps=1, adapter=seeing)).run()
    pipe, adapter = load_pair(str(tmp_path / "run"), None, "cpu")
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for method, moved in ((NONE, False), (CFG, True), (ONE_PASS, True)):
        one, other = (
            sample_setting(pipe, adapter, Setting(method, 3.0 if moved else 1.0), Request([row], [0], 2, {}))
            for row in (rows[0], rows[0] | {"negative_prompt": NEGATIVES[1]})
        )
        assert bool(torch.allclose(one.latents, other.latents, atol=1e-4)) is not moved
        assert one.denoiser_evaluations == (4 if method == CFG else 2)
        assert one.fused is (False if method == ONE_PASS else None)


def test_a_third_pass_at_one_step_becomes_part_of_one_pass(tmp_path: Path) -> None:
    third = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    call = {"max_sequence_length": 32} | third
    pipe, adapter = load_pair(str(trained(tmp_path, "stable_diffusion_3", height=32, width=32, call=call)), None, "cpu")
    assert third.items() <= arguments_of(pipe, adapter).items()
    evaluations = [
        sample_setting(pipe, adapter, Setting(method, scale), request_of(pipe, adapter)).denoiser_evaluations
        for method, scale in ((NONE, 1.0), (CFG, 3.0), (ONE_PASS, 3.0))
    ]
    assert evaluations == [2, 2 + 3, 2]
    assert json.loads((tmp_path / "data/generation.json").read_text())["teacher_evaluations"] == 4 * (2 + 3)
    assert '"skip_guidance_layers": [0]' in model_card(adapter.variant, 1, adapter.metadata)
