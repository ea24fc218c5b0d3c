from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.adapters import AdapterConfig
from stages.base.loading import load_pipeline
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.selection import SelectedSample
from stages.train.student import Student, describe_base, load_base
from stages.train.window import load

CONFIG = AdapterConfig(sites=["attention"], hidden_size=16, rank=4)


def test_untrained_it_is_the_unguided_teacher_at_the_recorded_inputs(dataset: Dataset, tiny_teacher: Path) -> None:
    window = load(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())])
    batch = window.take(torch.arange(len(window))).to("cpu", torch.float32)
    student = Student.create(dataset, CONFIG, load_base(dataset))
    teacher = load_pipeline(str(tiny_teacher)).transformer
    with torch.no_grad():
        unguided = teacher(batch.latent, timestep=batch.timestep, class_labels=batch.cond["class_labels"]).sample
        assert torch.equal(student.predict(batch), unguided)
    assert not torch.allclose(unguided, batch.target, atol=0.1)


def test_the_adapter_has_its_base_and_range(dataset: Dataset) -> None:
    metadata = describe_base(dataset)
    assert metadata.scale_range == [1.0, 6.0]
    assert metadata.conditions == {"class_labels": {"kind": "label", "classes": 10}}
    assert metadata.sampled["class_labels"] == list(range(10))
    assert metadata.base.denoiser_fingerprint == dataset.info.teacher.denoiser_fingerprint


def test_without_guidance_it_is_the_base_alone(dataset: Dataset) -> None:
    window = load(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())])
    batch = window.take(torch.arange(8)).to("cpu", torch.float32)
    student = Student.create(dataset, CONFIG, load_base(dataset))
    before = student.predict(batch)
    for parameter in student.adapter.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(student.predict(batch, guided=False), before)
    assert not torch.allclose(student.predict(batch), before, atol=1e-2)


def test_a_denoiser_without_gradient_checkpointing_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student.create(dataset, CONFIG, load_base(dataset))
    monkeypatch.setattr(type(student.denoiser), "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing=true: DiTTransformer2DModel does not support it"):
        student.checkpoint_gradients()
