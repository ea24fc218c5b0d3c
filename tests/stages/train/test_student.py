from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.adapters import AdapterConfig
from stages.base import load_pipeline
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.stream import load
from stages.train.student import Student, describe_base, load_base

CONFIG = AdapterConfig(sites=["attention"], hidden_size=16, rank=4)


def test_untrained_it_is_the_unguided_teacher_at_the_recorded_inputs(dataset: Dataset, tiny_teacher: Path) -> None:
    window = load(dataset, dataset.manifest.to_pylist())
    batch = window.take(torch.arange(len(window))).to("cpu", torch.float32)
    student = Student.create(dataset, CONFIG, None, "cpu")
    teacher = load_pipeline(str(tiny_teacher)).transformer
    with torch.no_grad():
        unguided = teacher(batch.latent, timestep=batch.timestep, class_labels=batch.cond["class_labels"]).sample
        assert torch.equal(student.predict(batch), unguided)
    assert not torch.allclose(unguided, batch.target, atol=0.1)


def test_only_the_denoiser_is_loaded_and_it_is_frozen(dataset: Dataset) -> None:
    denoiser = load_base(dataset, None, "cpu")
    assert type(denoiser).__name__ == "DiTTransformer2DModel"
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_other_weights_than_the_teachers_are_refused(dataset: Dataset, other_teacher: Path) -> None:
    with pytest.raises(UserError, match="not the weights that made .*: fingerprint"):
        Student.create(dataset, CONFIG, str(other_teacher), "cpu")


def test_a_base_that_is_not_there_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no DiTTransformer2DModel could be loaded"):
        Student.create(dataset, CONFIG, str(tmp_path / "missing"), "cpu")


def test_the_adapter_knows_its_base_and_range(dataset: Dataset) -> None:
    about = describe_base(dataset)
    assert about["scale_range"] == [1.0, 6.0]
    assert about["conditions"] == {"class_labels": {"kind": "label", "classes": 10}}
    assert about["sampled"]["class_labels"] == list(range(10))
    assert about["base"]["denoiser_fingerprint"] == dataset.info["teacher"]["denoiser_fingerprint"]
