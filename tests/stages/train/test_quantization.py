from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from stages.adapters import AdapterConfig
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.base import load_base, parameters_of
from stages.train.objective import squared_error
from stages.train.quantization import LIBRARIES, WithoutDerivative, check_quantization, quantize
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.window import load

CONFIG = AdapterConfig(sites=["attention"], hidden_size=16, rank=4)
ERRORS = {"int8": 0.05, "fp8": 0.1, "nf4": 0.3}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_quantised_base_predicts_nearly_the_same(dataset: Dataset, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    window = load(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())])
    batch = window.take(torch.arange(8)).to("cpu", torch.float32)
    bases = [load_base(dataset, quantization=each) for each in ("none", kind)]
    assert parameters_of(bases[1]) == parameters_of(bases[0])
    exact, quantised = (Student.create(dataset, CONFIG, base) for base in bases)
    assert type(quantised.denoiser.transformer_blocks[0].attn1.to_q.weight) is not nn.Parameter
    with torch.no_grad():
        one, other = (student.predict(batch, guided=False) for student in (exact, quantised))
    assert 0 < (one - other).norm() < ERRORS[kind] * one.norm()
    squared_error(quantised.predict(batch), batch.target).mean().backward()
    assert all(parameter.grad is not None for parameter in quantised.adapter.parameters())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_kernel_without_a_derivative_gets_that_of_its_weights(kind: str) -> None:
    """The 4-bit kernel has none, and needs a GPU; those in 8 bits have one to compare with."""
    pytest.importorskip("torchao")
    layer = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 8, bias=False)).requires_grad_(False)
    quantize(layer, kind)
    given = torch.randn(3, 5, 64, requires_grad=True)
    expected = layer(given)
    (gradient,) = torch.autograd.grad(expected.square().sum(), given)
    for linear in layer:
        WithoutDerivative.of(linear)
    assert [type(linear) for linear in layer] == [WithoutDerivative] * 2
    torch.testing.assert_close(layer(given), expected)
    (other,) = torch.autograd.grad(layer(given).square().sum(), given)
    torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-4)


def test_a_layer_that_stays_plain_keeps_its_own_derivative() -> None:
    assert type(WithoutDerivative.of(nn.Linear(4, 4))) is nn.Linear


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_missing_library_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"quantization={kind}: {LIBRARIES[kind]} is not installed: pip install"):
        check_quantization(kind, "cpu", torch.bfloat16)


def test_what_four_bits_of_torchao_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="quantization=int4: needs a GPU of compute capability 8.0"):
        check_quantization("int4", "cpu", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match="quantization=int4: computes in bf16 alone: add mixed_precision=bf16"):
        check_quantization("int4", "cuda", torch.float32)
    check_quantization("int4", "cuda", torch.bfloat16)
