from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.evaluate.comparisons import CFG, NONE, ONE_PASS, Setting
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation


def evaluation(adapter: Path, **changes: object) -> Evaluation:
    options = {
        "num_samples": 6,
        "batch_size": 4,
        "num_inference_steps": 3,
        "guidance_scale": [2.0, 4.0],
        "device": "cpu",
    }
    return Evaluation(EvaluateConfig(adapter_dir=str(adapter), **(options | changes)))  # type: ignore[arg-type]


def test_rows_tell_what_each_method_reached_and_cost(tiny_adapter: Path) -> None:
    run = evaluation(tiny_adapter)
    rows = {Setting(row["method"], row["guidance_scale"]): row for row in run.run()}
    assert list(rows) == run.settings
    assert {setting.method: row["denoiser_evaluations"] for setting, row in rows.items()} == {
        NONE: 3,
        CFG: 6,
        ONE_PASS: 3,
    }
    assert rows[Setting(NONE, 1.0)]["gap_closed"] == 0
    assert rows[Setting(CFG, 2.0)]["gap_closed"] == 1
    assert all(row["seconds_per_image"] > 0 and row["frechet_distance"] > 0 for row in rows.values())
    assert all(0 <= row["class_accuracy"] <= 1 for row in rows.values())
    assert run.shown[Setting(ONE_PASS, 2.0)].shape == (4, 1, 32, 32)


def test_the_gap_is_that_of_the_final_latents(tiny_adapter: Path) -> None:
    run = evaluation(tiny_adapter, guidance_scale=[3.0])
    rows = run.run()
    samples = [run._sample(range(4)), run._sample(range(4, 6))]
    none, cfg, one = (torch.cat([part[setting].latents for part in samples]) for setting in run.settings)
    expected = 1 - (one - cfg).square().mean() / (none - cfg).square().mean()
    assert rows[-1]["gap_closed"] == pytest.approx(float(expected), rel=1e-4)


def test_what_cannot_be_measured_is_refused(tiny_adapter: Path) -> None:
    with pytest.raises(UserError, match="at least 2"):
        evaluation(tiny_adapter, num_samples=1)
