from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import UserError
from stages.generate.plan import Plan
from stages.generate.teacher import Teacher, dtype_named
from tests.conftest import generate_config


def teacher(folder: Path, **changes: Any) -> tuple[Teacher, Plan]:
    config = generate_config(folder, Path("nowhere"), **changes)
    plan = Plan(config)
    return Teacher(config, plan.conditions[0]), plan


def test_a_unit_gives_its_trajectories_in_order(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    trajectories = list(made.run(plan.unit(1)))
    assert [t.index for t in trajectories] == [3, 4, 5]
    for t, planned in zip(trajectories, plan.unit(1).trajectories, strict=True):
        assert (t.guidance_scale, t.seed) == (planned.guidance_scale, planned.seed)
        assert t.condition == planned.condition
        assert int(t.cond["class_labels"]) == planned.condition["class_label"]
        assert t.latent.shape == t.target.shape == (4, 4, 8, 8)
        assert t.latent.dtype == t.target.dtype == torch.float16


def test_the_batch_size_changes_nothing_but_rounding(tiny_teacher: Path) -> None:
    together, plan = teacher(tiny_teacher, storage_dtype="float32")
    apart, _ = teacher(tiny_teacher, storage_dtype="float32", batch_size=2)
    for one, other in zip(together.run(plan.unit(0)), apart.run(plan.unit(0)), strict=True):
        torch.testing.assert_close(one.target, other.target, atol=2e-5, rtol=1e-4)
        assert torch.equal(one.timestep, other.timestep)


def test_units_lie_on_shifted_grids(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    grids = [next(made.run(plan.unit(i))).timestep for i in range(4)]
    assert len({tuple(grid.tolist()) for grid in grids}) == 4
    assert all(torch.equal(grid.diff(), torch.full((3,), -250)) for grid in grids)


def test_a_nan_names_its_trajectory_and_step(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    step = made.pipe.scheduler.step
    calls = []

    def broken(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = step(model_output, *args, **kwargs)
        if len(calls) == 2:
            result.prev_sample[1] = float("nan")
        return result

    made.pipe.scheduler.step = broken
    with pytest.raises(UserError, match="trajectory 4, step 2: the teacher's latent is not finite"):
        list(made.run(plan.unit(1)))


def test_an_overflow_in_storing_names_the_tensor(tiny_teacher: Path) -> None:
    made, plan = teacher(tiny_teacher)
    with torch.no_grad():
        made.pipe.transformer.proj_out_2.bias.fill_(1e5)
    with pytest.raises(
        UserError, match="trajectory 3, step 1: the teacher's latent does not fit into storage_dtype=float16"
    ):
        list(made.run(plan.unit(1)))


def test_facts_tell_weights_apart(tiny_teacher: Path, other_teacher: Path) -> None:
    (one, _), (other, _) = teacher(tiny_teacher), teacher(other_teacher)
    assert one.facts() == teacher(tiny_teacher)[0].facts()
    assert one.facts()["denoiser_fingerprint"] != other.facts()["denoiser_fingerprint"]
    assert one.facts()["scheduler_class"] == "DDIMScheduler"


def test_a_dtype_is_told_from_a_typing_error() -> None:
    assert dtype_named("bfloat16", "storage_dtype") == torch.bfloat16
    with pytest.raises(UserError, match="storage_dtype=half: one of float32, float16, bfloat16"):
        dtype_named("half", "storage_dtype")
