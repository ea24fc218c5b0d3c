from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from stages.base.hooks import watch_steps
from stages.base.sampling import Request, sample, undecoded
from stages.errors import UserError
from stages.generate.config import TeacherConfig
from stages.generate.plan import Plan
from stages.generate.steps import count_steps, timesteps_of
from tests.conftest import generate_config
from tests.support.families import PROMPTS, build, save

SCHEDULERS = {
    "DDIMScheduler": 10,
    "PNDMScheduler": 19,
    "HeunDiscreteScheduler": 19,
    "KDPM2DiscreteScheduler": 19,
    "KDPM2AncestralDiscreteScheduler": 19,
    "EulerAncestralDiscreteScheduler": 10,
    "DPMSolverSinglestepScheduler": 10,
    "UniPCMultistepScheduler": 10,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save("stable_diffusion", tmp_path_factory.mktemp("steps") / "teacher")
    (folder / "../prompts.txt").write_text(PROMPTS[0])
    return folder


def planned(folder: Path, teacher: dict[str, Any], **changes: Any) -> Plan:
    config = generate_config(folder, Path("nowhere"), prompts=str(folder.parent / "prompts.txt"), **changes)
    config.teacher = replace(config.teacher, **teacher)
    return Plan(config)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_plan_has_the_steps_that_the_pipeline_makes(teacher: Path, scheduler: str) -> None:
    plan = planned(teacher, {"scheduler": scheduler}, num_inference_steps=10, num_trajectories=3)
    assert plan.steps_per_trajectory == plan.records_per_trajectory == SCHEDULERS[scheduler]
    assert plan.num_records == 3 * SCHEDULERS[scheduler]
    assert plan.evaluations_per_trajectory == 2 * SCHEDULERS[scheduler]
    pipe = build("stable_diffusion")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    steps: list[Any] = []
    with undecoded(pipe), watch_steps(pipe, lambda calls, prediction, timestep: steps.append(timestep)):
        sample(pipe, Request([{"prompt": PROMPTS[0]}], [0], 10, {}), 3.0)
    assert len(steps) == plan.steps_per_trajectory


def test_recorded_steps_are_drawn_from_all_steps(teacher: Path) -> None:
    options = {"num_inference_steps": 5, "num_trajectories": 200, "num_recorded_steps": 3}
    plan = planned(teacher, {"scheduler": "HeunDiscreteScheduler"}, **options)
    assert {step for i in range(200) for step in plan.trajectory(i).steps or []} == set(range(9))
    assert plan.records_per_trajectory == 3
    with pytest.raises(
        UserError, match="num_recorded_steps=10: at most 9, which the teacher takes of num_inference_st"
    ):
        planned(teacher, {"scheduler": "HeunDiscreteScheduler"}, **options | {"num_recorded_steps": 10})


@pytest.mark.parametrize(("strength", "steps"), [(None, 8), (0.5, 5), (1.0, 10)])
def test_a_pipeline_that_starts_later_is_asked_for_its_steps(teacher: Path, strength: float | None, steps: int) -> None:
    call = {} if strength is None else {"strength": strength}
    teacher_config = TeacherConfig(str(teacher), pipeline_class="StableDiffusionImg2ImgPipeline", call=call)
    assert count_steps(teacher_config, 10) == steps
    assert count_steps(replace(teacher_config, scheduler="HeunDiscreteScheduler"), 10) == 2 * steps - 1
    with pytest.raises(UserError, match="num_inference_steps=10: no step is left of them"):
        count_steps(replace(teacher_config, call={"strength": 0.01}), 10)


@pytest.mark.parametrize(
    ("name", "num_inference_steps", "message"),
    [
        ("DDIMScheduler", 1001, "num_inference_steps=1001: at most 1000, the timesteps of the teacher's scheduler"),
        ("DPMSolverMultistepScheduler", 1200, "num_inference_steps=1200: at most 1000"),
        ("LCMScheduler", 60, "num_inference_steps=60: LCMScheduler: "),
        ("AutoencoderKL", 10, "teacher.scheduler=AutoencoderKL: no scheduler"),
        ("NoScheduler", 10, "teacher.scheduler=NoScheduler: diffusers .* has no such class"),
    ],
)
def test_more_steps_than_a_scheduler_can_make_are_refused(
    teacher: Path, name: str, num_inference_steps: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        count_steps(TeacherConfig(str(teacher), scheduler=name), num_inference_steps)


def test_flows_with_timesteps_from_one_to_zero_take_any_number_of_steps() -> None:
    flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for scheduler, steps in ((flow, 50), (shifting, 1200)):
        timesteps = timesteps_of(scheduler, steps)
        assert timesteps is not None
        assert len(timesteps) == steps
    timesteps = timesteps_of(DDPMWuerstchenScheduler(), 10)
    assert timesteps is not None
    torch.testing.assert_close(timesteps, torch.linspace(1, 0.1, 10))


def test_the_pipeline_runs_a_scheduler_that_cannot_count_its_steps(teacher: Path, tmp_path: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"_class_name": "MyScheduler"}))
    assert count_steps(TeacherConfig(str(tmp_path)), 10) == 10
