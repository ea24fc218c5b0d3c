"""Every family through all commands: generated, trained on, sampled in one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.base.denoiser import denoiser_of, unflatten
from stages.base.hooks import Call, watch_steps
from stages.base.loading import load_pipeline
from stages.base.sampling import CALL_DEFAULTS, Request, sample, undecoded
from stages.evaluate.comparisons import Setting, load_pair, sample_setting
from stages.evaluate.conditions import conditions_of
from stages.evaluate.methods import CFG, NONE, ONE_PASS
from stages.generate.config import TeacherConfig
from stages.generate.plan import GOLDEN_RATIO
from stages.generate.timesteps import shifted_timesteps
from stages.records.dataset import Dataset
from stages.records.verification import verify
from stages.train.base import load_base
from stages.train.decoding import Decoder
from stages.train.sampling import Run, follow, whole_trajectory
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.trainer import Trainer
from stages.train.window import load
from tests.conftest import generate, generate_config, small_adapter, train_config
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, save

ADAPTER = small_adapter()
NEGATIVE_PROMPTS = ["grey", "a blurry one leaning left"]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def dataset(family: str, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six trajectories of two prompts of different length, each with a negative one, in two units."""
    folder = tmp_path_factory.mktemp(family)
    prompts = folder / "prompts.jsonl"
    asked = [{"prompt": p, "negative_prompt": n} for p, n in zip(PROMPTS, NEGATIVE_PROMPTS, strict=True)]
    prompts.write_text("\n".join(json.dumps(row) for row in asked))
    config = generate_config(
        save(family, folder / "teacher"),
        folder / "data",
        prompts=str(prompts),
        num_trajectories=None,
        num_trajectories_per_condition=3,
        storage_dtype="float32",
        preview=2,
    )
    config.teacher = TeacherConfig(config.teacher.pretrained_model_name_or_path, call=ARGUMENTS.get(family, {}))
    return Dataset(generate(config))


def test_the_dataset_is_whole_and_records_the_layout(dataset: Dataset) -> None:
    found = verify(dataset.root)
    assert found["ok"]
    assert found["records"] == 6 * 4
    layout = dataset.info.teacher.layout
    assert layout.calls * layout.chunks == 2
    assert dataset.plan.guidance.rule["name"] == "ClassifierFreeGuidance"
    assert dataset.plan.conditions.prompts == 2
    assert Path(dataset.root.where("preview.png")).stat().st_size > 100


def test_untrained_the_student_is_the_unguided_teacher(dataset: Dataset) -> None:
    """The noise at the first step is the same, so that the untouched pipeline's prediction at scale 1 is known."""
    teacher = dataset.info.teacher
    pipe: Any = load_pipeline(teacher.pretrained_model_name_or_path)
    row = next(row for row in dataset.manifest.to_pylist() if row["trajectory"] == 0)
    batch = load(dataset, [SelectedSample(row)]).take(torch.tensor([0])).to("cpu", torch.float32)
    seen: list[Call] = []
    request = Request([{"prompt": row["prompt"]}], [row["seed"]], 4, teacher.arguments)
    shifted = shifted_timesteps(pipe.scheduler, 0.5 * GOLDEN_RATIO)
    with shifted, undecoded(pipe), watch_steps(pipe, lambda calls, received, _: seen.append(calls[0])):
        sample(pipe, request, 1.0)
    inputs, denoiser = seen[0].inputs, denoiser_of(pipe)[1]
    student = Student.create(dataset, ADAPTER, load_base(dataset))
    torch.testing.assert_close(inputs[dataset.info.teacher.layout.arguments.latent], batch.latent)
    with torch.no_grad():
        unguided = denoiser(**unflatten(inputs), return_dict=False)[0]
        predicted = student.predict(batch)
    torch.testing.assert_close(predicted, unguided[:, : predicted.shape[1]], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(predicted, batch.target, atol=1e-3)


def test_an_adapter_is_trained_and_samples_in_one_pass(dataset: Dataset, tmp_path: Path) -> None:
    config = train_config(dataset.root, tmp_path / "run", max_train_steps=3, adapter=ADAPTER)
    trainer = Trainer(config)
    assert trainer.validation.sampling is not None, trainer.remarks
    summary = trainer.run()
    assert summary["loss"] > 0
    assert summary["gap_closed"]
    pipe, adapter = load_pair(config.output_dir, None, "cpu")
    request = Request(conditions_of(type(pipe), adapter, None, PROMPTS), [0, 1], 3, adapter.metadata.arguments)
    guided, one_pass = (sample_setting(pipe, adapter, Setting(method, 3.0), request) for method in (CFG, ONE_PASS))
    assert (guided.denoiser_evaluations, one_pass.denoiser_evaluations) == (2 * 3 * 2, 3 * 2)
    assert one_pass.latents.shape == guided.latents.shape
    adapter.attach(pipe)
    with undecoded(pipe) as latents:
        arguments = CALL_DEFAULTS.get(type(pipe).__name__, {}) | adapter.metadata.arguments
        pipe(PROMPTS[0], guidance_scale=3.0, num_inference_steps=2, output_type="pt", **arguments)
    assert len(latents) == 1


def test_the_recorded_result_decodes_to_the_preview(dataset: Dataset) -> None:
    """The teacher's pipeline decoded the preview."""
    teacher = dataset.info.teacher
    decoder = Decoder(teacher.pretrained_model_name_or_path, dataset, "cpu")
    window = whole_trajectory(dataset, 0, skip_damaged=False)
    decoded = decoder.picture(window.size, follow(Run(teacher, 4, window)))
    preview = Image.open(dataset.root.where("preview/00000.png"))
    pixels, expected = (np.asarray(picture.convert("RGB"), dtype=float) for picture in (decoded, preview))
    assert expected.std() > 1
    assert abs(pixels - expected).max() <= 2


def test_the_adapter_found_its_conditions_in_the_records(dataset: Dataset) -> None:
    student = Student.create(dataset, ADAPTER, load_base(dataset))
    kinds = {info["kind"]: name for name, info in student.adapter.metadata.conditions.items()}
    assert kinds["tokens"] == "encoder_hidden_states"
    assert kinds.get("pooled") in {None, "added_cond_kwargs.text_embeds", "pooled_projections"}
    assert json.dumps(student.adapter.metadata.to_json())


def test_negative_prompts_are_seen_in_one_pass_as_recorded(dataset: Dataset) -> None:
    """The pipeline encodes them by its own rules; neither the evaluations nor the noise notice it."""
    adapter = Student.create(
        dataset, small_adapter(conditions=["timestep", "negative_tokens"]), load_base(dataset)
    ).adapter
    adapter.detach()
    teacher = dataset.info.teacher
    pipe: Any = load_pipeline(teacher.pretrained_model_name_or_path)
    seen: list[torch.Tensor] = []
    adapter.conditioning.conditions[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = {row["prompt"]: row for row in dataset.manifest.to_pylist()}
    recorded = load(dataset, [SelectedSample(rows[prompt]) for prompt in PROMPTS]).take(torch.tensor([0, 4])).cond
    conditions = [{"prompt": p, "negative_prompt": n} for p, n in zip(PROMPTS, NEGATIVE_PROMPTS, strict=True)]
    request = Request(conditions, [0, 1], 2, teacher.arguments)
    unguided, guided = (
        sample_setting(pipe, adapter, setting, request) for setting in (Setting(NONE, 1.0), Setting(ONE_PASS, 3.0))
    )
    assert (guided.denoiser_evaluations, len(seen)) == (2 * 2, 2)
    torch.testing.assert_close(seen[0], recorded["negative.encoder_hidden_states"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(guided.latents, unguided.latents)
