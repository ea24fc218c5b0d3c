"""Shifted timestep grids, so that many short trajectories together cover every training timestep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from stages.base.noise_levels import DENSE, Table, dense_table, noise_level
from stages.base.patching import patched
from stages.errors import UserError


@contextmanager
def shifted_timesteps(scheduler: Any, shift: float) -> Iterator[None]:
    """Within the context, shift the timestep grid of a scheduler, and of copies made of it, inside the training range.

    Args:
        shift: in [0, 1), as a share of the grid's spacing.

    Raises:
        UserError: the scheduler's noise levels follow from its timesteps by no known function.
    """

    if "num_train_timesteps" not in scheduler.config:
        raise UserError(
            f"{type(scheduler).__name__}: its range of timesteps is not known: record with shift_timesteps=false"
        )

    def shifted(set_timesteps: Any, owner: Any, *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        if getattr(owner, "sigmas", None) is None:
            _move(owner, shift)
        else:
            _spread(owner, shift, _dense_table(owner, args, kwargs))

    with patched(scheduler, "set_timesteps", shifted, in_copies=True):
        yield


def _move(scheduler: Any, shift: float) -> None:
    """Move the whole grid, because such a scheduler takes the next timestep to be one spacing below the current one."""
    last = scheduler.config.num_train_timesteps - 1
    grid = scheduler.timesteps
    spacing = int(-grid.diff().min()) if len(grid) > 1 else last + 1
    room_above = last - int(grid.max())
    moved = int(shift * spacing) - max(0, spacing - 1 - room_above)
    scheduler.timesteps = (grid + moved).clamp(0, last)


def _dense_table(scheduler: Any, args: Any, kwargs: dict[str, Any]) -> Table | None:
    """The scheduler's table for many steps; None where the call gives no number of steps."""
    if (not args and kwargs.get("num_inference_steps") is None) or args[:1] == (None,):
        return None

    def set_dense(dense: Any) -> None:
        if args:
            dense.set_timesteps(DENSE, *args[1:], **kwargs)
        else:
            dense.set_timesteps(**kwargs | {"num_inference_steps": DENSE})

    return dense_table(scheduler, set_dense)


def _spread(scheduler: Any, shift: float, table: Table | None) -> None:
    """Place each timestep between two of the grid's, with the scheduler's noise level at that timestep."""
    grid = scheduler.timesteps.double().cpu().numpy()
    sigmas = scheduler.sigmas.double().cpu().numpy()
    level = noise_level(scheduler, grid, sigmas[: len(grid)], table)
    if level is None:
        raise UserError(
            f"{type(scheduler).__name__}: its noise levels do not follow from its timesteps as known here: "
            "record with shift_timesteps=false"
        )
    ends = _with_ends(grid, scheduler.config.num_train_timesteps)
    places = (np.arange(len(grid)) + shift) * (len(ends) - 1) / len(grid)
    moved = np.interp(places, np.arange(len(ends)), ends)
    if not scheduler.timesteps.is_floating_point():
        moved = np.floor(moved)
    scheduler.timesteps = torch.from_numpy(moved).to(scheduler.timesteps)
    levels = np.append(level(moved), sigmas[len(grid) :])
    scheduler.sigmas = torch.from_numpy(levels).to(scheduler.sigmas)


def _with_ends(grid: np.ndarray, num_train_timesteps: int) -> np.ndarray:
    """Extend the grid to the noisiest timestep and to 0; an end replaces a grid point closer than half a spacing."""
    top = max(grid[0], num_train_timesteps - 1.0)
    if len(grid) == 1:
        return np.array([top, 0.0])
    half = (grid[:-1] - grid[1:]) / 2
    inner = grid[int(top - grid[0] < half[0]) : len(grid) - int(grid[-1] < half[-1])]
    return np.concatenate([[top], inner, [0.0]])
