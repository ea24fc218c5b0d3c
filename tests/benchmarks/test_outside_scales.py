from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages.adapters import GuidanceAdapter, conditioning
from stages.train.trainer import Trainer
from tests.benchmarks import outside_scales
from tests.conftest import small_adapter, train_config


def test_the_same_weights_are_measured_by_each_rule(
    shared_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside_scales, "FURTHEST", {"held": 1.0, "twice": 2.0})
    folder = tmp_path / "adapter"
    Trainer(train_config(shared_dataset, folder, adapter=small_adapter(variant="lora"), max_train_steps=1)).run()
    adapter = GuidanceAdapter.from_pretrained(folder)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # an untrained adapter changes nothing
    adapter.save_pretrained(folder)
    capsys.readouterr()
    outside_scales.main(str(folder), ["num_samples=4", "num_inference_steps=2", "guidance_scale=[9]"])
    found = json.loads(capsys.readouterr().out)
    held, twice = (next(row for row in found[rule] if row["method"] == "one_pass") for rule in ("held", "twice"))
    assert held["guidance_scale"] == twice["guidance_scale"] == 9
    assert held["gap_closed"] != twice["gap_closed"]
    assert conditioning.FURTHEST == 2.0
