from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from stages.records.teacher import TeacherFacts
from stages.train.batch import Batch
from stages.train.objective import Objective, noise_levels, squared_error
from tests.support.made_up import teacher_facts

TEACHER = teacher_facts()
FLOW = replace(
    TEACHER,
    scheduler_class="FlowMatchEulerDiscreteScheduler",
    layout=replace(TEACHER.layout, timestep_scale=1e-3),
)
PREDICTION, TARGET = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16), torch.full((2, 3, 2, 2), 3.0)


def losses(
    loss: str, timestep: list[float], teacher: TeacherFacts = TEACHER, **guidance_stats: list[float]
) -> torch.Tensor:
    """A batch of two records at a squared distance of 9."""
    info = {name: torch.tensor(values) for name, values in guidance_stats.items()}
    batch = Batch(PREDICTION, torch.tensor(timestep), TARGET, torch.full((2,), 2.0), {}, info)
    return Objective(loss, teacher, "cpu")(PREDICTION, batch)


def test_the_loss_is_the_mean_square_of_each_record() -> None:
    prediction, target = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16), torch.ones(2, 3, 2, 2)
    target[1] *= 2
    assert torch.equal(squared_error(prediction, target), torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize(("loss", "expected"), [("l2", 9.0), ("l1", 3.0)])
def test_each_loss_matches_its_name(loss: str, expected: float) -> None:
    assert torch.equal(losses(loss, [999, 0]), torch.full((2,), expected))


def test_the_root_of_the_mean_square_has_a_gradient_at_zero() -> None:
    torch.testing.assert_close(losses("rms", [999, 0]), torch.full((2,), 3.0))
    prediction = torch.ones(1, 3, 2, 2, requires_grad=True)
    batch = Batch(prediction, torch.tensor([9]), torch.ones(1, 3, 2, 2), torch.tensor([2.0]), {})
    Objective("rms", TEACHER, "cpu")(prediction, batch).sum().backward()
    assert torch.equal(prediction.grad, torch.zeros(1, 3, 2, 2))


def test_the_weight_is_the_noise_that_the_scheduler_adds() -> None:
    expected = 9 * (1 - DDIMScheduler().alphas_cumprod[[999, 100]]).sqrt()
    torch.testing.assert_close(losses("noise_weighted", [999, 100]), expected)


def test_flow_matching_counts_its_noise_by_the_timestep() -> None:
    assert noise_levels(FLOW)[500] == 0.5
    torch.testing.assert_close(losses("noise_weighted", [0.25, 0.75], FLOW), torch.tensor([9 * 0.25, 9 * 0.75]))


def test_the_weight_grows_with_the_angle_by_which_guidance_turns_the_prediction() -> None:
    weighted = losses("guidance_weighted", [999, 0], guidance_cosine=[1.0, -0.5])
    assert torch.equal(weighted, torch.tensor([0.0, 9 * 0.75]))


def test_the_error_is_a_share_of_what_guidance_adds() -> None:
    """The share has a floor at a thousandth of the target's mean square, because guidance may add nothing."""
    weighted = losses("guidance_delta", [999, 0], guidance_delta=[18.0, 0.0])
    torch.testing.assert_close(weighted, torch.tensor([0.5, 1000.0]))
