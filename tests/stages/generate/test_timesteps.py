from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stages.errors import UserError
from stages.generate.timesteps import shifted_timesteps

SHIFTS = np.arange(0.005, 1, 0.01)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    **{f"ddim {spacing}": DDIMScheduler(timestep_spacing=spacing) for spacing in ("leading", "trailing", "linspace")},
    "ddpm": DDPMScheduler(),
    **{
        f"euler {spacing}": EulerDiscreteScheduler(timestep_spacing=spacing)
        for spacing in ("leading", "trailing", "linspace")
    },
    "euler karras": EulerDiscreteScheduler(use_karras_sigmas=True),
    **{
        f"dpm-solver++ {spacing}": DPMSolverMultistepScheduler(timestep_spacing=spacing)
        for spacing in ("leading", "trailing", "linspace")
    },
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc flow": UniPCMultistepScheduler(**FLOW),
}


@pytest.fixture(params=list(SCHEDULERS))
def scheduler(request: pytest.FixtureRequest) -> Any:
    return SCHEDULERS[request.param]


def grids(scheduler: Any, steps: int = 20) -> list[np.ndarray]:
    made = []
    for shift in SHIFTS:
        with shifted_timesteps(scheduler, float(shift)):
            scheduler.set_timesteps(steps)
        made.append(scheduler.timesteps.double().numpy())
    return made


def test_shifted_grids_cover_the_training_range_and_stay_inside(scheduler: Any) -> None:
    made = grids(scheduler)
    seen = np.sort(np.concatenate(made))
    assert seen.min() >= 0
    assert seen.max() <= 1000
    # No hole is wider than the widest step of the stock grid over the number of shifts, twice for rounding.
    scheduler.set_timesteps(20)
    stock = np.abs(np.diff(scheduler.timesteps.double().numpy())).max()
    assert np.diff(np.concatenate([[0], seen, [999]])).max() <= max(4, 3 * stock / len(SHIFTS))
    assert all((np.diff(grid) < 0).all() for grid in made)


def test_noise_levels_follow_the_timesteps(scheduler: Any) -> None:
    if getattr(scheduler, "sigmas", None) is None:
        pytest.skip("has no noise levels of its own: it computes them from the timestep")
    with shifted_timesteps(scheduler, 0.4):
        scheduler.set_timesteps(20)
    timesteps, sigmas = scheduler.timesteps.double().numpy(), scheduler.sigmas.double().numpy()
    assert len(sigmas) == len(timesteps) + 1
    if "flow" in (scheduler.config.get("prediction_type") or "") or "Flow" in type(scheduler).__name__:
        expected = timesteps / 1000
    else:
        alphas = scheduler.alphas_cumprod.double().numpy()
        expected = np.interp(timesteps, np.arange(1000), ((1 - alphas) / alphas) ** 0.5)
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=2e-3, atol=1e-3)


def test_a_shifted_scheduler_steps_from_noise_to_the_image(scheduler: Any) -> None:
    """With the true noise as the prediction, each step of a first-order scheduler leads to the same clean image."""
    if isinstance(scheduler, DDIMScheduler) and scheduler.config.timestep_spacing == "linspace":
        pytest.skip("DDIM takes steps of another length than such a grid has, shifted or not")
    if type(scheduler).__name__ not in ("DDIMScheduler", "EulerDiscreteScheduler") or scheduler.config.get(
        "clip_sample"
    ):
        scheduler = type(scheduler).from_config({**scheduler.config, "clip_sample": False})
    if not isinstance(scheduler, (DDIMScheduler, EulerDiscreteScheduler)):
        pytest.skip("not deterministic and first order in the noise prediction")
    clean, noise = torch.full((1, 1, 2, 2), 0.5), torch.randn(1, 1, 2, 2)
    with shifted_timesteps(scheduler, 0.7):
        scheduler.set_timesteps(10)
    latent = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        scheduler.scale_model_input(latent, t)
        latent = scheduler.step(noise, t, latent).prev_sample
    torch.testing.assert_close(latent, clean, atol=0.03, rtol=0.03)


def test_the_scheduler_is_unchanged_afterwards(scheduler: Any) -> None:
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    with shifted_timesteps(scheduler, 0.5):
        scheduler.set_timesteps(7)
    assert "set_timesteps" not in vars(scheduler)
    scheduler.set_timesteps(7)
    assert torch.equal(scheduler.timesteps, before)


def test_unsupported_noise_levels_are_refused() -> None:
    scheduler = HeunDiscreteScheduler()  # it uses each noise level twice
    with (
        pytest.raises(UserError, match="HeunDiscreteScheduler: .*shift_timesteps=false"),
        shifted_timesteps(scheduler, 0.5),
    ):
        scheduler.set_timesteps(10)
