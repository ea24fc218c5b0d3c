"""Every shipped configuration has only keys that its command knows."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest

from stages.adapters import GuidanceAdapter
from stages.configuration.options import check_bounds
from stages.configuration.parsing import parse
from stages.evaluate.config import EvaluateConfig
from stages.generate.call_arguments import check_arguments
from stages.generate.config import GenerateConfig
from stages.study.plan import StudyFile
from stages.train.config import TrainConfig
from tests.support.real_shapes import SHAPES

CONFIGS = Path(__file__).parents[1] / "configs"
PIPELINES = {  # of the families that tests/pipelines_zoo builds tiny
    "cogview4": "CogView4Pipeline",
    "flux2_klein_base": "Flux2KleinPipeline",
    "flux_dev": "FluxPipeline",
    "hunyuan_image": "HunyuanImagePipeline",
    "ltx2": "LTX2Pipeline",
    "lumina2": "Lumina2Pipeline",
    "qwen_image_edit": "QwenImageEditPipeline",
    "sana": "SanaPipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "wan22": "WanPipeline",
    "z_image": "ZImagePipeline",
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "generate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_teachers_configuration_is_valid(path: Path) -> None:
    config = parse(GenerateConfig, ["--config", str(path), "output_dir=data"])
    check_bounds(config)
    assert config.teacher.pretrained_model_name_or_path
    assert config.teacher.scheduler is None or hasattr(diffusers, config.teacher.scheduler)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_teachers_pipeline_takes_its_call_arguments(name: str) -> None:
    config = parse(GenerateConfig, ["--config", str(CONFIGS / "generate" / f"{name}.yaml"), "output_dir=data"])
    kind = getattr(diffusers, PIPELINES[name])
    check_arguments(kind, config.teacher.call, config.teacher)
    taken = inspect.signature(kind.__call__).parameters
    assert config.teacher.height is None or {"height", "width"} <= taken.keys()


def test_every_family_has_a_configuration_and_a_shape() -> None:
    configs = {path.stem for path in (CONFIGS / "generate").glob("*.yaml")}
    assert configs == {shape.config for shape in SHAPES} | PIPELINES.keys() | {"emoji", "mnist_dit", "mnist_sd"}


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_variants_configuration_is_valid(path: Path) -> None:
    config = parse(TrainConfig, ["--config", str(path), "data_dir=data", "output_dir=run"])
    check_bounds(config)
    assert config.adapter.variant == path.stem
    assert path.stem in GuidanceAdapter.variants


def test_the_study_of_the_claims_is_valid() -> None:
    plan = parse(StudyFile, ["--config", str(CONFIGS / "study" / "claims.yaml")])
    for overrides in plan.datasets.values():
        check_bounds(parse(GenerateConfig, [*overrides, "output_dir=data"]))
    for adapter in plan.adapters.values():
        assert adapter.data in plan.datasets
        check_bounds(parse(TrainConfig, [*adapter.overrides, "data_dir=data", "output_dir=run"]))
    for name, evaluation in plan.evaluations.items():
        assert set(evaluation.adapters) <= set(plan.adapters)
        check_bounds(parse(EvaluateConfig, [*evaluation.overrides, "adapter_dir=run"]))
        assert name in {*(claim.evaluation for claim in plan.claims.values()), "variants"}
