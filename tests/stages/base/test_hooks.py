from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stages.base.hooks import Call, count_evaluations, watch_steps


class Doubling(nn.Module):
    """A denoiser that removes an entry of the dictionary it receives."""

    def forward(self, sample: Tensor, timestep: Any, extras: dict[str, Tensor], return_dict: bool = True) -> Any:
        output = 2 * sample + extras.pop("shift")
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_watched_call_is_not_affected_by_later_changes(return_dict: bool) -> None:
    pipe = SimpleNamespace(unet=Doubling(), scheduler=DDIMScheduler())
    pipe.scheduler.set_timesteps(2)
    latent, steps, after = torch.ones(2, 1, 2, 2), [], []

    def see(calls: list[Call], received: list[Tensor], timestep: int) -> None:
        steps.append((calls, received[0], timestep))

    with watch_steps(pipe, see, after.append):
        for timestep in pipe.scheduler.timesteps:
            first = pipe.unet(latent, timestep, {"shift": torch.tensor(1.0)}, return_dict=return_dict)[0]
            second = pipe.unet(latent, timestep, {"shift": torch.tensor(2.0)}, return_dict=return_dict)[0]
            guided = second.mul_(3).sub_(2 * first)
            made = pipe.scheduler.step(guided, timestep, latent, return_dict=return_dict)
            assert torch.equal(after[-1], made[0])
    assert [timestep for _, _, timestep in steps] == pipe.scheduler.timesteps.tolist()
    for calls, prediction, _ in steps:
        assert [float(call.inputs["extras.shift"]) for call in calls] == [1, 2]
        assert [call.prediction.unique().tolist() for call in calls] == [[3], [4]]
        assert prediction.unique().tolist() == [6]


def test_a_watched_latent_is_not_affected_by_in_place_writes() -> None:
    pipe = SimpleNamespace(unet=Doubling(), scheduler=DDIMScheduler())
    pipe.scheduler.set_timesteps(3)
    latent, seen = torch.ones(1, 1, 2, 2), []
    with watch_steps(pipe, lambda calls, received, timestep: seen.append(calls[0]), streams=None):
        for timestep in pipe.scheduler.timesteps:
            prediction = pipe.unet(latent, timestep, {"shift": torch.tensor(0.0)})[0]
            latent.copy_(pipe.scheduler.step(prediction, timestep, latent)[0])
    assert len(seen) == 3
    for call in seen:
        assert torch.equal(call.prediction, 2 * call.inputs["sample"])


class OfLists(nn.Module):
    """A denoiser that takes its samples in a list, like Z-Image's."""

    def forward(self, x: list[Tensor], t: Any) -> list[Tensor]:
        return x


def test_samples_in_a_list_are_counted_one_by_one() -> None:
    denoiser = OfLists()
    with count_evaluations(denoiser) as count:
        denoiser([torch.zeros(16, 1, 4, 4)] * 2, t=3)
    assert count == [2]
    assert "forward" not in vars(denoiser)
