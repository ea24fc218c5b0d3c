"""Shifted timestep grids, so that many short trajectories together cover every training timestep."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from stages.base.patching import patched
from stages.errors import UserError

DENSE = 1000  # steps in a dense table of noise levels
FITS = 0.02  # relative tolerance at which noise levels match the scheduler's own


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


Table = tuple[np.ndarray, np.ndarray]  # timesteps and their noise levels, from the noisiest down


def _dense_table(scheduler: Any, args: Any, kwargs: dict[str, Any]) -> Table | None:
    """The scheduler's timesteps and noise levels for many steps; None where the call gives no number of steps."""
    if (not args and kwargs.get("num_inference_steps") is None) or args[:1] == (None,):
        return None
    dense = copy.deepcopy(scheduler)
    vars(dense).pop("set_timesteps", None)  # the scheduler's own method, without the shift
    try:
        if args:
            dense.set_timesteps(DENSE, *args[1:], **kwargs)
        else:
            dense.set_timesteps(**kwargs | {"num_inference_steps": DENSE})
    except Exception:  # some schedulers cannot make so many steps
        return None
    timesteps = dense.timesteps.double().cpu().numpy()
    return timesteps, dense.sigmas.double().cpu().numpy()[: len(timesteps)]


def _spread(scheduler: Any, shift: float, table: Table | None) -> None:
    """Place each timestep between two of the grid's, with the scheduler's noise level at that timestep."""
    grid = scheduler.timesteps.double().cpu().numpy()
    sigmas = scheduler.sigmas.double().cpu().numpy()
    noise_level = _noise_level(scheduler, grid, sigmas[: len(grid)], table)
    ends = _with_ends(grid, scheduler.config.num_train_timesteps)
    places = (np.arange(len(grid)) + shift) * (len(ends) - 1) / len(grid)
    moved = np.interp(places, np.arange(len(ends)), ends)
    if not scheduler.timesteps.is_floating_point():
        moved = np.floor(moved)
    scheduler.timesteps = torch.from_numpy(moved).to(scheduler.timesteps)
    levels = np.append(noise_level(moved), sigmas[len(grid) :])
    scheduler.sigmas = torch.from_numpy(levels).to(scheduler.sigmas)


def _with_ends(grid: np.ndarray, num_train_timesteps: int) -> np.ndarray:
    """Extend the grid to the noisiest timestep and to 0; an end replaces a grid point closer than half a spacing."""
    top = max(grid[0], num_train_timesteps - 1.0)
    if len(grid) == 1:
        return np.array([top, 0.0])
    half = (grid[:-1] - grid[1:]) / 2
    inner = grid[int(top - grid[0] < half[0]) : len(grid) - int(grid[-1] < half[-1])]
    return np.concatenate([[top], inner, [0.0]])


def _shifted_flow(times: np.ndarray, sigmas: np.ndarray, whole: int) -> Any:
    """Noise levels of flow matching with a static shift, `a x / (1 + (a - 1) x)`; the grid's middle gives a."""
    middle = len(times) // 2
    x, sigma = np.clip([times[middle], sigmas[middle]], 1e-6, 1 - 1e-6)
    a = sigma / (1 - sigma) * (1 - x) / x
    return lambda t: a * (t / whole) / (1 + (a - 1) * (t / whole))


def _noise_level(scheduler: Any, grid: np.ndarray, sigmas: np.ndarray, dense: Table | None) -> Any:
    """The function from timesteps to noise levels that reproduces the scheduler's own grid."""
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
    raise UserError(
        f"{type(scheduler).__name__}: its noise levels do not follow from its timesteps as known here: "
        "record with shift_timesteps=false"
    )
