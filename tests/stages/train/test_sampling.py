from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stages.generate.config import TeacherConfig
from stages.records.dataset import Dataset
from stages.train.base import load_base
from stages.train.batch import Batch
from stages.train.sampling import HeldOutSampling, NotSampledError, choose
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.window import load
from tests.conftest import generate, generate_config, small_adapter

NULL_CLASS = 1000


def recorded(teacher: Path, folder: Path, scheduler: str | None = None, **changes: Any) -> Dataset:
    config = generate_config(teacher, folder, **changes)
    return Dataset(generate(replace(config, teacher=TeacherConfig(str(teacher), scheduler=scheduler))))


def sampling_of(dataset: Dataset, **changes: Any) -> HeldOutSampling:
    samples = [SelectedSample(row) for row in dataset.manifest.to_pylist()]
    return HeldOutSampling(dataset, samples, (1.0, 6.0), "cpu", **changes)


def student_of(dataset: Dataset) -> Student:
    return Student.create(dataset, small_adapter(), load_base(dataset))


def guided_by_two_passes(student: Student) -> Student:
    """A student that makes no error."""
    one_pass = student.predict

    def predict(batch: Batch, guided: bool = True) -> Tensor:
        conditional = one_pass(batch, guided=False)
        nothing = {"class_labels": torch.full_like(batch.cond["class_labels"], NULL_CLASS)}
        unconditional = one_pass(replace(batch, cond=nothing), guided=False)
        scale = batch.scale.view(-1, 1, 1, 1) if guided else 1.0
        return unconditional + scale * (conditional - unconditional)

    vars(student)["predict"] = predict
    return student


@pytest.mark.parametrize("scheduler", [None, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_who_predicts_as_two_passes_closes_the_gap(tiny_teacher: Path, tmp_path: Path, scheduler: str | None) -> None:
    dataset = recorded(tiny_teacher, tmp_path, scheduler, num_inference_steps=6)
    samples = sampling_of(dataset).measure(guided_by_two_passes(student_of(dataset)))
    assert len(samples.gap_closed) == 2
    assert all(closed > 0.99 for closed in samples.gap_closed.values()), samples.gap_closed


def test_the_noise_is_the_first_input_without_the_schedulers_scaling(tmp_path: Path) -> None:
    options = {"prompts": "stages/embedded/mnist_sd/prompts.csv", "num_trajectories": 2}
    sampling = sampling_of(recorded(Path("stages/embedded/mnist_sd"), tmp_path, "EulerDiscreteScheduler", **options))
    dataset = Dataset(tmp_path)
    for held_out, row in zip(sampling.held_out, dataset.manifest.sort_by("scale").to_pylist(), strict=True):
        first = load(dataset, [SelectedSample(row)]).records.latent[0].float()
        assert held_out.noise.std() > 5 * first.std()
        torch.testing.assert_close(sampling._begin(held_out).batch(0).latent[0], first)


def test_what_a_scheduler_raises_is_the_reason(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise RuntimeError("not here\nat all")

    monkeypatch.setattr(DDIMScheduler, "step", step)
    with pytest.raises(NotSampledError, match="^DDIMScheduler: RuntimeError: not here$"):
        sampling_of(dataset)


def test_an_untrained_adapter_closes_nothing(dataset: Dataset) -> None:
    sampling, student = sampling_of(dataset), student_of(dataset)
    before, samples = torch.get_rng_state(), sampling.measure(student)
    assert set(samples.gap_closed.values()) == {0.0}
    assert torch.equal(torch.get_rng_state(), before)
    assert sampling.evaluations == 4 * len(samples.one_pass)
    assert sampling.measure(student).unguided is samples.unguided


def test_the_denoiser_is_given_a_training_batch_at_a_time(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    student, sizes = student_of(dataset), set()
    together = sampling_of(dataset).measure(student).one_pass
    predict = student.predict
    monkeypatch.setattr(student, "predict", lambda batch, **kw: sizes.add(len(batch)) or predict(batch, **kw))
    apart = sampling_of(dataset, batch_size=1).measure(student).one_pass
    assert sizes == {1}
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_gain_is_on_the_scale(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, student, scales = sampling_of(dataset), student_of(dataset), []
    predict = student.predict
    monkeypatch.setattr(student, "predict", lambda batch, **_: scales.append(batch.scale) or predict(batch))
    for gain in (1.0, 1.2):
        sampling.measure(student, gain)
    asked, gained = scales[4], scales[-1]  # the first four are without guidance
    torch.testing.assert_close(gained, (1 + 1.2 * (asked - 1)).clamp(max=6.0))


@pytest.mark.parametrize(
    ("scheduler", "changes", "reason"),
    [
        (None, {"num_recorded_steps": 2}, "num_recorded_steps=2 leaves steps out"),
        (None, {"trajectory": "diffusion"}, "trajectory=diffusion records no sampling runs"),
        ("DDPMScheduler", {}, "the scheduler draws noise"),
        ("EulerDiscreteScheduler", {}, "the pipeline changes the latents"),  # DiT's steps them scaled
    ],
)
def test_what_cannot_be_sampled_is_left_out_with_its_reason(
    tiny_teacher: Path, tmp_path: Path, scheduler: str | None, changes: Any, reason: str
) -> None:
    with pytest.raises(NotSampledError, match=reason):
        sampling_of(recorded(tiny_teacher, tmp_path, scheduler, **changes))


def test_a_trajectory_in_several_parts_is_whole(dataset: Dataset, tiny_teacher: Path, tmp_path: Path) -> None:
    parts = sampling_of(recorded(tiny_teacher, tmp_path, records_per_sample=3))
    for one, other in zip(parts.two_passes, sampling_of(dataset).two_passes, strict=True):
        assert torch.equal(one, other)


def test_damaged_trajectories_are_left_out(damaged: Path) -> None:
    whole = sampling_of(Dataset(damaged)).counts
    (damaged / Dataset(damaged).manifest["shard"][0].as_py()).unlink()
    some = sampling_of(Dataset(damaged, check_sizes=False), skip_damaged=True).counts
    assert 0 < sum(some) < sum(whole)


def sample_at(trajectory: int, scale: float) -> SelectedSample:
    return SelectedSample({"trajectory": trajectory, "scale": scale})


def test_the_trajectories_are_nearest_to_a_third_and_two_thirds_of_the_scales() -> None:
    samples = [sample_at(i, 1 + i / 10) for i in range(31)]
    assert choose(samples, (1.0, 4.0)) == [[8, 9, 10, 11], [18, 19, 20, 21]]
    assert choose(samples[:3], (1.0, 4.0)) == [[1, 2]]  # a scale of 1 has no gap
    assert choose([sample_at(0, 3.0), sample_at(1, 3.0)], (3.0, 3.0)) == [[0, 1]]
