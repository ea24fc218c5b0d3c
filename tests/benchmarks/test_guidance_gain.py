from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.adapters import GuidanceAdapter
from tests.benchmarks import guidance_gain


def test_the_same_weights_are_measured_with_their_gain_and_without(
    tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = GuidanceAdapter.from_pretrained(tiny_adapter)
    adapter.metadata = replace(adapter.metadata, guidance_gain=1.5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # an untrained adapter changes nothing
    adapter.save_pretrained(tmp_path / "adapter")
    overrides = ["num_samples=4", "num_inference_steps=2", "guidance_scale=[2,3]"]
    guidance_gain.main(str(tmp_path / "adapter"), overrides)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "guidance gain 1.500"
    assert [line.split()[:2] for line in lines[-4:]] == [
        ["2", "with"],
        ["2", "without"],
        ["3", "with"],
        ["3", "without"],
    ]
    assert lines[-4].split()[2] != lines[-3].split()[2]
