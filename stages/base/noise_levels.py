"""A scheduler's timesteps, and the noise levels that belong to timesteps beside its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

DENSE = 1000  # steps in a dense table of noise levels
FITS = 0.02  # relative tolerance at which noise levels match the scheduler's own
Table = tuple[np.ndarray, np.ndarray]  # timesteps and their noise levels, from the noisiest down


def set_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    """Set the timesteps as pipelines do: with `sigmas` for a scheduler of one training timestep, with `mu` if used."""
    known = inspect.signature(scheduler.set_timesteps).parameters
    named: dict[str, Any] = {}
    if "mu" in known and scheduler.config.get("use_dynamic_shifting"):
        named["mu"] = 1.0
    if "sigmas" in known and scheduler.config.get("num_train_timesteps") == 1:
        named["sigmas"] = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
    scheduler.set_timesteps(num_inference_steps, **named)


def place(scheduler: Any, timesteps: Tensor, num_inference_steps: int) -> None:
    """Have a scheduler step over the timesteps `[k]` of a run of `num_inference_steps`.

    Raises:
        ValueError: its noise levels follow from its timesteps by no known function.
    """
    set_timesteps(scheduler, num_inference_steps)
    grid = scheduler.timesteps
    moved = timesteps.to(grid.dtype) if grid.is_floating_point() else timesteps.double().round().to(grid.dtype)
    if grid.shape == moved.shape and torch.allclose(grid.double(), moved.double(), rtol=1e-4):
        return
    scheduler.timesteps = moved
    if getattr(scheduler, "sigmas", None) is None:
        return
    own, sigmas = grid.double().cpu().numpy(), scheduler.sigmas.double().cpu().numpy()
    dense = dense_table(scheduler, lambda denser: set_timesteps(denser, DENSE))
    level = noise_level(scheduler, own, sigmas[: len(own)], dense)
    if level is None:
        raise ValueError("its noise levels do not follow from its timesteps as known here")
    levels = np.append(level(moved.double().cpu().numpy()), sigmas[len(own) :])
    scheduler.sigmas = torch.from_numpy(levels).to(scheduler.sigmas)


def dense_table(scheduler: Any, set_dense: Callable[[Any], None]) -> Table | None:
    """A scheduler's timesteps and noise levels for many steps; None where it cannot make so many.

    Args:
        set_dense: gives a copy of the scheduler many timesteps.
    """
    dense = copy.deepcopy(scheduler)
    vars(dense).pop("set_timesteps", None)  # the scheduler's own method, without patches
    try:
        set_dense(dense)
    except Exception:  # some schedulers cannot make so many steps
        return None
    timesteps = dense.timesteps.double().cpu().numpy()
    return timesteps, dense.sigmas.double().cpu().numpy()[: len(timesteps)]


def noise_level(
    scheduler: Any, grid: np.ndarray, sigmas: np.ndarray, dense: Table | None
) -> Callable[[np.ndarray], np.ndarray] | None:
    """The function from timesteps to noise levels that reproduces the scheduler's own grid; None if none is known."""
    whole = scheduler.config.num_train_timesteps
    known = [lambda t: t / whole, _shifted_flow(grid / whole, sigmas, whole)]
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        alphas = scheduler.alphas_cumprod.double().cpu().numpy()
        table = ((1 - alphas) / alphas) ** 0.5
        known.append(lambda t: np.interp(t, np.arange(len(table)), table))
    if dense is not None and (np.diff(dense[0]) < 0).all():
        known.append(lambda t: np.interp(t, dense[0][::-1], dense[1][::-1]))
    for level in known if (np.diff(grid) < 0).all() else []:
        if np.allclose(level(grid), sigmas, rtol=FITS, atol=1e-4):
            return level
    return None


def _shifted_flow(times: np.ndarray, sigmas: np.ndarray, whole: int) -> Callable[[np.ndarray], np.ndarray]:
    """Noise levels of flow matching with a static shift, `a x / (1 + (a - 1) x)`; the grid's middle gives a."""
    middle = len(times) // 2
    x, sigma = np.clip([times[middle], sigmas[middle]], 1e-6, 1 - 1e-6)
    a = sigma / (1 - sigma) * (1 - x) / x
    return lambda t: a * (t / whole) / (1 + (a - 1) * (t / whole))
