from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.adapters import AdapterConfig
from stages.errors import UserError
from stages.train import base, foresight
from stages.train.defaults import RunConfig
from stages.train.trainer import Trainer
from tests.conftest import train_config


def foreseen(data: Path, output: Path, **changes: Any) -> str:
    return Trainer(train_config(data, output, gradient_checkpointing=True, **changes), dry_run=True).foresight


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(base, "load_denoiser", loaded)


def test_a_dry_run_tells_layers_and_peak_and_writes_nothing(shared_dataset: Path, tmp_path: Path) -> None:
    line = foreseen(shared_dataset, tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    assert re.fullmatch(r"base: \d+ layers in fp32; predicted peak \d+\.\d MB", line)
    assert not list(tmp_path.iterdir())


def test_a_wrong_vae_is_named_before_anything_is_loaded(shared_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vae_name_or_path=missing: no VAE could be loaded from it"):
        foreseen(shared_dataset, tmp_path, vae_name_or_path="missing")


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_quantised_layers_are_counted_without_the_library(shared_dataset: Path, tmp_path: Path, kind: str) -> None:
    line = foreseen(shared_dataset, tmp_path, quantization=kind, mixed_precision="bf16")
    assert re.match(rf"base: \d+ linear layers in {kind}, \d+ others in bf16; predicted peak", line)


def test_a_dry_run_foresees_a_run_on_another_machine(shared_dataset: Path, tmp_path: Path) -> None:
    config = train_config(
        shared_dataset, tmp_path, quantization="int4", gradient_checkpointing=True, mixed_precision="bf16"
    )
    trainer = Trainer(config, dry_run=True)
    assert re.search(r"in int4, .* predicted peak", trainer.foresight)
    with pytest.raises(UserError, match="quantization=int4: "):  # torchao or a GPU is missing
        trainer.check_machine()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_dry_run_names_a_missing_gpu_last(shared_dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(train_config(shared_dataset, tmp_path, device="cuda"), dry_run=True)
    assert "predicted peak" in trainer.foresight
    with pytest.raises(UserError, match="device=cuda: this device is not available"):
        trainer.check_machine()


def test_an_offloaded_base_is_not_in_the_peak(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []
    predict = foresight.predict_peak
    monkeypatch.setattr(foresight, "predict_peak", lambda *args: peaks.append(predict(*args)) or peaks[-1])
    foreseen(shared_dataset, tmp_path, adapter=AdapterConfig(rank=1), train_batch_size=1)
    line = foreseen(
        shared_dataset, tmp_path, adapter=AdapterConfig(rank=1), train_batch_size=1, enable_group_offload=True
    )
    assert ", offloaded layer by layer; predicted peak" in line
    assert peaks[1] < peaks[0]


def test_what_cannot_be_predicted_ends_no_run(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> int:
        raise RuntimeError("reads a value\nand more")

    monkeypatch.setattr(foresight, "predict_peak", failing)
    assert foreseen(shared_dataset, tmp_path).endswith("; the peak of memory cannot be predicted: reads a value")


def test_a_dry_run_refuses_what_a_run_would(shared_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no DiTTransformer2DModel could be loaded"):
        foreseen(shared_dataset, tmp_path, pretrained_model_name_or_path=str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"adapter.sites: nothing: no layer"):
        foreseen(shared_dataset, tmp_path, adapter=AdapterConfig(sites=["nothing"]))


def test_an_average_takes_memory_as_the_adapter_does(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[dict[str, int]] = []
    step_bytes = foresight.step_bytes
    monkeypatch.setattr(foresight, "step_bytes", lambda *args: parts.append(step_bytes(*args)) or parts[-1])
    for use_ema in (False, True):
        foreseen(shared_dataset, tmp_path, use_ema=use_ema)
    assert parts[1]["peak"] - parts[0]["peak"] == parts[1]["average"] == parts[1]["adapter"]


def test_a_base_in_gguf_is_in_no_precision_of_torch() -> None:
    with torch.device("meta"):
        base = torch.nn.Linear(2, 2)
    assert foresight.describe_layers(base, RunConfig("", ""), "GGUF") == "base: 1 layers in GGUF"
