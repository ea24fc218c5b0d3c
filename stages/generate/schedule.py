"""Shifted timestep grids: many short trajectories that together cover every timestep of the training."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from stages.errors import UserError

FITS = 0.02  # a table of noise levels is the scheduler's own if it gives its grid back so exactly


@contextmanager
def shifted_timesteps(scheduler: Any, shift: float) -> Iterator[None]:
    """Within it, the scheduler's grid lies `shift` (in [0, 1)) of its own spacing further on, inside the training range.

    Raises:
        UserError: the scheduler's noise levels do not follow from its timesteps in a way that is known here.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines look at its signature
    def shifted(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        if getattr(scheduler, "sigmas", None) is None:
            _move(scheduler, shift)
        else:
            _spread(scheduler, shift)

    scheduler.set_timesteps = shifted
    try:
        yield
    finally:
        del scheduler.set_timesteps


def _move(scheduler: Any, shift: float) -> None:
    """Move the whole grid: such a scheduler takes the timestep after this one to be one spacing below it."""
    last = scheduler.config.num_train_timesteps - 1
    grid = scheduler.timesteps
    spacing = int(-grid.diff().min()) if len(grid) > 1 else last + 1
    room_above = last - int(grid.max())
    moved = int(shift * spacing) - max(0, spacing - 1 - room_above)
    scheduler.timesteps = (grid + moved).clamp(0, last)


def _spread(scheduler: Any, shift: float) -> None:
    """Place each timestep between two of the grid's own, with the noise level that the scheduler gives that timestep."""
    grid = scheduler.timesteps.double().cpu().numpy()
    sigmas = scheduler.sigmas.double().cpu().numpy()
    noise_level = _noise_level(scheduler, grid, sigmas[: len(grid)])
    ends = _with_ends(grid, scheduler.config.num_train_timesteps)
    places = (np.arange(len(grid)) + shift) * (len(ends) - 1) / len(grid)
    moved = np.interp(places, np.arange(len(ends)), ends)
    if not scheduler.timesteps.is_floating_point():
        moved = np.floor(moved)
    scheduler.timesteps = torch.from_numpy(moved).to(scheduler.timesteps)
    levels = np.append(noise_level(moved), sigmas[len(grid) :])
    scheduler.sigmas = torch.from_numpy(levels).to(scheduler.sigmas)


def _with_ends(grid: np.ndarray, num_train_timesteps: int) -> np.ndarray:
    """The grid from the noisiest timestep to 0; an end closer than half a spacing takes the place of the grid's own."""
    top = max(grid[0], num_train_timesteps - 1.0)
    if len(grid) == 1:
        return np.array([top, 0.0])
    half = (grid[:-1] - grid[1:]) / 2
    inner = grid[int(top - grid[0] < half[0]) : len(grid) - int(grid[-1] < half[-1])]
    return np.concatenate([[top], inner, [0.0]])


def _noise_level(scheduler: Any, grid: np.ndarray, sigmas: np.ndarray) -> Any:
    """The function from timesteps to noise levels that gives the scheduler's own grid back."""
    known = [lambda t: t / scheduler.config.num_train_timesteps]  # flow matching
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        alphas = scheduler.alphas_cumprod.double().cpu().numpy()
        table = ((1 - alphas) / alphas) ** 0.5
        known.append(lambda t: np.interp(t, np.arange(len(table)), table))
    for level in known if (np.diff(grid) < 0).all() else []:
        if np.allclose(level(grid), sigmas, rtol=FITS, atol=1e-4):
            return level
    raise UserError(
        f"{type(scheduler).__name__}: its noise levels do not follow from its timesteps as known here: "
        "record with shift_timesteps=false"
    )
