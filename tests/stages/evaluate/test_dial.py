"""The dial of the digits' teacher and a briefly trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.adapters import GuidanceAdapter
from stages.base.denoiser import denoiser_of, fingerprint
from stages.base.loading import load_pipeline
from stages.configuration.parsing import parse
from stages.errors import UserError
from stages.evaluate.conditions import conditions_of
from stages.evaluate.dial import STRENGTHS, measure_dial
from stages.train.config import TrainConfig
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, small_adapter

TEACHER = Path("stages/embedded/mnist_dit")
SCALE = 3.0


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(str(TEACHER))


def trained(root: Path, trajectories: int, steps: int) -> GuidanceAdapter:
    changes = {
        "num_trajectories": trajectories,
        "num_inference_steps": 10,
        "trajectories_per_unit": 40,
        "batch_size": 40,
    }
    data = generate(generate_config(TEACHER, root / "data", guidance_scale=[SCALE, SCALE], **changes))
    overrides = ["--config", "configs/train/lora.yaml", f"data_dir={data}", f"output_dir={root}/adapter"]
    options = [f"max_train_steps={steps}", "train_batch_size=32", "report_to=none", "device=cpu"]
    Trainer(parse(TrainConfig, [*overrides, *options, "adapter.hidden_size=32"])).run()
    return GuidanceAdapter.from_pretrained(root / "adapter")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> GuidanceAdapter:
    """An adapter to this teacher; its quality does not matter."""
    return trained(tmp_path_factory.mktemp("digits"), trajectories=4, steps=1)


def dial(pipe: Any, adapter: GuidanceAdapter) -> list[dict[str, float]]:
    conditions = conditions_of(type(pipe), adapter, None, [])
    return measure_dial(pipe, adapter, SCALE, conditions, num_samples=15, num_inference_steps=10)


@pytest.mark.long
def test_more_strength_is_more_guidance(pipe: Any, tmp_path: Path) -> None:
    adapter = trained(tmp_path, trajectories=160, steps=300)
    before = fingerprint(denoiser_of(pipe)[1])
    found = dial(pipe, adapter)
    scales = [row["guidance_scale"] for row in found]
    assert [row["strength"] for row in found] == list(STRENGTHS)
    assert scales == sorted(set(scales))
    assert dict(zip(STRENGTHS, scales, strict=True))[1.0] == pytest.approx(SCALE, abs=0.6)
    assert fingerprint(denoiser_of(pipe)[1]) == before


def test_an_adapter_that_does_nothing_has_a_dial_that_does_nothing(pipe: Any, adapter: GuidanceAdapter) -> None:
    untrained = GuidanceAdapter.for_denoiser(small_adapter(sites=["attention"]), pipe.transformer, adapter.metadata)
    assert {row["guidance_scale"] for row in dial(pipe, untrained)} == {1.0}


def test_an_adapter_that_cannot_be_fused_has_no_dial(pipe: Any, adapter: GuidanceAdapter) -> None:
    offset = GuidanceAdapter.for_denoiser(small_adapter("offset"), pipe.transformer, adapter.metadata)
    with pytest.raises(UserError, match="cannot be fused"):
        dial(pipe, offset)
