from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from stages.base.noise_levels import place, set_timesteps

FLOWS = [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}]


def test_own_timesteps_keep_the_schedulers_own_levels() -> None:
    for scheduler in (EulerDiscreteScheduler(), HeunDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        own = copy.deepcopy(scheduler)
        set_timesteps(own, 7)
        place(scheduler, own.timesteps, 7)
        assert torch.equal(scheduler.sigmas, own.sigmas)


@pytest.mark.parametrize("changes", FLOWS)
def test_the_level_of_flow_matching_is_the_timestep(changes: dict[str, float]) -> None:
    scheduler, timesteps = FlowMatchEulerDiscreteScheduler(**changes), torch.tensor([950.0, 500.0, 120.0])
    place(scheduler, timesteps, 3)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.95, 0.5, 0.12, 0.0]))


def test_whole_timesteps_stay_whole() -> None:
    scheduler = DDIMScheduler()
    place(scheduler, torch.tensor([700.0001, 399.9999]), 2)
    assert scheduler.timesteps.tolist() == [700, 400]


def test_timesteps_of_unknown_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="noise levels do not follow from its timesteps"):
        place(HeunDiscreteScheduler(), torch.tensor([700.0, 400.0]), 2)
