from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from stages.adapters import AdapterConfig
from stages.base.loading import load_pipeline
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.objective import squared_error
from stages.train.selection import SelectedSample
from stages.train.student import Student, cast, describe_base, load_base
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


def test_only_the_denoiser_is_loaded_and_it_is_frozen(dataset: Dataset) -> None:
    denoiser = load_base(dataset)
    assert type(denoiser).__name__ == "DiTTransformer2DModel"
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_other_weights_than_the_teachers_are_refused(dataset: Dataset, other_teacher: Path) -> None:
    with pytest.raises(UserError, match="not the weights that made .*: fingerprint"):
        load_base(dataset, str(other_teacher))


def test_a_missing_base_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no DiTTransformer2DModel could be loaded"):
        load_base(dataset, str(tmp_path / "missing"))


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


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_base_has_the_requested_precision(dataset: Dataset, precision: str, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load_base(dataset, mixed_precision=precision).parameters()} == {dtype}


def test_modules_kept_in_fp32_stay_in_fp32() -> None:
    class Makers(torch.nn.Module):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)

    module = Makers()
    cast(module, torch.bfloat16)
    assert (module.norm.weight.dtype, module.linear.weight.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_quantization_without_its_library_is_named(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="quantization=int8: torchao is not installed"):
        load_base(dataset, quantization="int8")


def test_a_quantised_base_predicts_nearly_the_same(dataset: Dataset) -> None:
    pytest.importorskip("torchao")
    window = load(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())])
    batch = window.take(torch.arange(8)).to("cpu", torch.float32)
    exact, quantised = (
        Student.create(dataset, CONFIG, load_base(dataset, quantization=kind)) for kind in ("none", "int8")
    )
    assert type(quantised.denoiser.transformer_blocks[0].attn1.to_q.weight) is not torch.nn.Parameter
    one, other = (student.predict(batch, guided=False) for student in (exact, quantised))
    assert 0 < (one - other).norm() < 0.05 * one.norm()
    squared_error(quantised.predict(batch), batch.target).mean().backward()
    assert all(parameter.grad is not None for parameter in quantised.adapter.parameters())


def test_a_denoiser_without_gradient_checkpointing_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student.create(dataset, CONFIG, load_base(dataset))
    monkeypatch.setattr(type(student.denoiser), "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing=true: DiTTransformer2DModel does not support it"):
        student.checkpoint_gradients()
