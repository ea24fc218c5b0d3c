from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.train.objective import Objective, noise_levels, squared_error

TEACHER: dict[str, Any] = {
    "scheduler_class": "DDIMScheduler",
    "scheduler_config": {"num_train_timesteps": 1000},
    "layout": {"timestep_scale": 1.0},
}
FLOW = TEACHER | {"scheduler_class": "FlowMatchEulerDiscreteScheduler", "layout": {"timestep_scale": 1e-3}}
PREDICTION, TARGET = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16), torch.full((2, 3, 2, 2), 3.0)


def test_it_is_the_mean_square_of_each_record() -> None:
    prediction, target = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16), torch.ones(2, 3, 2, 2)
    target[1] *= 2
    assert torch.equal(squared_error(prediction, target), torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize(("loss", "expected"), [("l2", 9.0), ("l1", 3.0)])
def test_each_loss_is_what_its_name_says(loss: str, expected: float) -> None:
    objective = Objective(loss, TEACHER, "cpu")
    assert torch.equal(objective(PREDICTION, TARGET, torch.tensor([999, 0])), torch.full((2,), expected))


def test_the_weight_is_the_noise_that_the_scheduler_adds() -> None:
    from diffusers import DDIMScheduler

    weighted = Objective("noise_weighted", TEACHER, "cpu")(PREDICTION, TARGET, torch.tensor([999, 100]))
    expected = 9 * (1 - DDIMScheduler().alphas_cumprod[[999, 100]]).sqrt()
    torch.testing.assert_close(weighted, expected)


def test_flow_matching_counts_its_noise_by_the_timestep() -> None:
    assert noise_levels(FLOW)[500] == 0.5
    weighted = Objective("noise_weighted", FLOW, "cpu")(PREDICTION, TARGET, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(weighted, torch.tensor([9 * 0.25, 9 * 0.75]))
