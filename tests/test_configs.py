"""Every configuration that ships says only what its command knows."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from pipeline.command import parse
from pipeline.study_plan import StudyFile
from stages.adapters import GuidanceAdapter
from stages.config import check_bounds
from stages.evaluate.claims import CLAIMS
from stages.evaluate.config import EvaluateConfig
from stages.generate.config import GenerateConfig
from stages.train.config import TrainConfig
from tests.real_shapes import SHAPES

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "generate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_teachers_configuration_is_understood(path: Path) -> None:
    config = parse(GenerateConfig, ["--config", str(path), "output_dir=data"])
    check_bounds(config)
    assert config.teacher.pretrained_model_name_or_path
    assert config.teacher.scheduler is None or hasattr(diffusers, config.teacher.scheduler)


def test_every_family_has_a_configuration_and_a_shape() -> None:
    here = {path.stem for path in (CONFIGS / "generate").glob("*.yaml")}
    assert here == {shape.config for shape in SHAPES} | {"mnist_dit", "mnist_sd"}


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_variants_configuration_is_understood(path: Path) -> None:
    config = parse(TrainConfig, ["--config", str(path), "data_dir=data", "output_dir=run"])
    check_bounds(config)
    assert config.adapter.variant == path.stem
    assert path.stem in GuidanceAdapter.variants


def test_the_study_of_the_claims_is_understood() -> None:
    plan = parse(StudyFile, ["--config", str(CONFIGS / "evaluate" / "claims.yaml")])
    for words in plan.datasets.values():
        check_bounds(parse(GenerateConfig, [*words, "output_dir=data"]))
    for adapter in plan.adapters.values():
        assert adapter.data in plan.datasets
        check_bounds(parse(TrainConfig, [*adapter.words, "data_dir=data", "output_dir=run"]))
    for name, evaluation in plan.evaluations.items():
        assert set(evaluation.adapters) <= set(plan.adapters)
        check_bounds(parse(EvaluateConfig, [*evaluation.words, "adapter_dir=run"]))
        assert name in {*CLAIMS, "variants"}
