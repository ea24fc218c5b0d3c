"""Every variant, trained on the same shards, closes a part of the gap to guidance; untrained it closes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.adapters import GuidanceAdapter
from stages.base.loading import load_pipeline
from stages.base.sampling import Request
from stages.configuration.parsing import parse
from stages.evaluate.comparisons import Samples, Setting, sample_setting
from stages.evaluate.methods import CFG, NONE, ONE_PASS
from stages.train.config import TrainConfig
from stages.train.trainer import Trainer
from tests.conftest import VARIANTS, generate, generate_config, mostly_long
from tests.stages.evaluate.test_partial_guidance import AdapterStub

TEACHER = Path("stages/embedded/mnist_dit")
SCALE = 2.0
REQUEST = Request([{"class_label": i % 10} for i in range(20)], list(range(1000, 1020)), 10, {})
CONFIGS = Path(__file__).parents[3] / "configs" / "train"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(str(TEACHER))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset at one scale, so that a variant without the scale can learn from it too."""
    changes = {"num_trajectories": 80, "num_inference_steps": 10, "trajectories_per_unit": 40, "batch_size": 40}
    folder = tmp_path_factory.mktemp("digits")
    return generate(generate_config(TEACHER, folder, guidance_scale=[SCALE, SCALE], **changes))


@pytest.fixture(scope="module")
def references(pipe: Any) -> dict[str, Samples]:
    adapter: Any = AdapterStub(None)
    return {
        method: sample_setting(pipe, adapter, Setting(method, scale), REQUEST)
        for method, scale in ((NONE, 1.0), (CFG, SCALE))
    }


def gap_closed(samples: Samples, references: dict[str, Samples]) -> float:
    """Return one minus the squared distance to two passes, relative to that without guidance."""
    guided = references[CFG].latents
    left, whole = ((latents - guided).square().sum() for latents in (samples.latents, references[NONE].latents))
    return float(1 - left / whole)


@pytest.mark.long
def test_the_default_closes_a_part_of_the_gap_of_a_unet_with_prompts(tmp_path: Path) -> None:
    """The second teacher has convolutions, cross-attention and several scales in each batch."""
    teacher = Path("stages/embedded/mnist_sd")
    prompts = tmp_path / "prompts.txt"
    texts = [
        f"a {stroke} {digit} leaning {side}"
        for digit in ("two", "five", "eight")
        for stroke in ("thin", "bold")
        for side in ("left", "right")
    ]
    prompts.write_text("\n".join(texts))
    sizes = {"num_trajectories": 60, "num_inference_steps": 10, "trajectories_per_unit": 30, "batch_size": 30}
    shards = generate(
        generate_config(teacher, tmp_path / "data", guidance_scale=[1.0, 4.0], prompts=str(prompts), **sizes)
    )
    overrides = ["--config", str(CONFIGS / "lora.yaml"), f"data_dir={shards}", f"output_dir={tmp_path / 'run'}"]
    Trainer(
        parse(
            TrainConfig,
            [
                *overrides,
                "max_train_steps=60",
                "lr_warmup_steps=10",
                "train_batch_size=32",
                "report_to=none",
                "device=cpu",
            ],
        )
    ).run()
    adapter, pipe = GuidanceAdapter.from_pretrained(tmp_path / "run"), load_pipeline(str(teacher))
    request = Request([{"prompt": prompt} for prompt in texts], list(range(1000, 1000 + len(texts))), 10, {})
    settings = Setting(NONE, 1.0), Setting(CFG, 3.0), Setting(ONE_PASS, 3.0)
    none, cfg, one_pass = (sample_setting(pipe, adapter, setting, request) for setting in settings)
    assert one_pass.fused
    assert gap_closed(one_pass, {NONE: none, CFG: cfg}) > 0.7


@pytest.mark.parametrize("variant", mostly_long(VARIANTS, ["lora"]))
def test_training_closes_a_part_of_the_gap(
    variant: str, shards: Path, pipe: Any, references: dict[str, Samples], tmp_path: Path
) -> None:
    overrides = ["--config", str(CONFIGS / f"{variant}.yaml"), f"data_dir={shards}", f"output_dir={tmp_path}"]
    options = ["max_train_steps=100", "lr_warmup_steps=10", "train_batch_size=32", "report_to=none", "device=cpu"]
    small = ["adapter.hidden_size=32", *(["adapter.rank=64"] if variant == "embedding" else [])]
    trainer = Trainer(parse(TrainConfig, [*overrides, *options, *small]))
    trainer.run()
    adapter = GuidanceAdapter.from_pretrained(tmp_path)
    untrained = type(adapter)(adapter.config, adapter.shapes, adapter.metadata)
    untrained.init_from_base(pipe.transformer)
    start, end = (
        gap_closed(sample_setting(pipe, each, Setting(ONE_PASS, SCALE), REQUEST), references)
        for each in (untrained, adapter)
    )
    assert start == 0
    assert end > (0.8 if variant == "lora" else 0.25)
