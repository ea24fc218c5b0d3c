"""Find a denoiser's per-sample arguments and its timestep, by their changes between trial runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.base.arguments import Arguments, Axis, argument
from stages.base.denoiser import TIMESTEP_NAMES, denoiser_of, latent_name
from stages.generate.probing import (
    Seen,
    is_number,
    uncertain,
)
from stages.generate.unguided import Unguided

SCALES_OF_TIMESTEPS = ((1.0, 0.0), (1e-3, 0.0), (-1e-3, 1.0), (-1.0, 1000.0), (1e3, 0.0))
ON_SCALE = 0.01  # tolerance, as a share of the timesteps' range: some pipelines round them


def find_arguments(pipe: Any, unguided: Unguided) -> Arguments:
    """The per-sample arguments, which grow with the batch; the search for the conditional call adds `constants`."""
    denoiser = denoiser_of(pipe)[1]
    latent = latent_name(denoiser)
    one = [step.calls[0].inputs for step in unguided.one]
    two = None if unguided.two is None else unguided.two[-1].calls[0].inputs
    timestep = _find_timestep(pipe, latent, one)
    lists = {listed_name(name) for name in one[-1]} - one[-1].keys()
    listed = {name: axis for name in lists if (axis := _place_of(name, one[-1], two)) is not None}
    names = [name for name in one[-1] if listed_name(name) not in listed]
    places = listed | {name: place for name in names if (place := _place_of(name, one[-1], two)) is not None}
    places |= {name: Axis(shared=True) for name in unguided.following if listed_name(name) not in places}
    places |= {name: Axis() for name in unguided.beside}
    if latent not in places:
        raise uncertain(pipe, f"the denoiser's {latent} does not grow with the batch")
    if timestep in places and torch.as_tensor(one[-1][timestep]).numel() == 1:
        del places[timestep]
    changing = [n for n in places if n != latent and _changes(places[n], n, one)]
    return Arguments(latent, timestep, places, {}, tuple(changing))


def listed_name(name: str) -> str:
    """The name of the list that a flat name belongs to, or the name itself."""
    return name.partition(".[")[0] if ".[" in name else name


def _place_of(name: str, one: dict[str, Any], two: dict[str, Any] | None) -> Axis | None:
    """The axis of an argument's samples, from its values for one sample and for two; None where it has none."""
    if name not in one:
        entries = argument(one, name, Axis(listed=True))
        grown = None if two is None else argument(two, name, Axis(listed=True))
        is_listed = (
            entries is not None and len(entries) == 1 and (two is None or (grown is not None and len(grown) == 2))
        )
        return Axis(listed=True) if is_listed and all(isinstance(entry, Tensor) for entry in entries) else None
    value = one[name]
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    if two is None:
        return Axis() if len(value) == 1 else None
    other = two.get(name)
    if not isinstance(other, Tensor) or other.ndim != value.ndim:
        return None
    sizes = list(zip(value.shape, other.shape, strict=True))
    grown_dims = [dim for dim, (size, size_of_two) in enumerate(sizes) if size_of_two == 2 * size and size]
    unchanged = sum(size == size_of_two for size, size_of_two in sizes)
    if len(grown_dims) != 1 or unchanged != value.ndim - 1:
        return None
    return Axis(grown_dims[0], value.shape[grown_dims[0]])


def _changes(place: Axis, name: str, steps: list[dict[str, Any]]) -> bool:
    values = [place.taken(value, 0, 1) for step in steps if (value := argument(step, name, place)) is not None]
    return any(not _equal(value, values[0]) for value in values[1:])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(other, Tensor) and torch.equal(one, other)


def _find_timestep(pipe: Any, latent: str, steps: list[dict[str, Any]]) -> str:
    """The name of the denoiser's timestep: an argument that changes from step to step, a number or one per token.

    Raises:
        UserError: no argument does.
    """
    first, last = steps[0], steps[-1]
    changing = [
        name for name in first if listed_name(name) != latent and name in last and moved(first[name], last[name])
    ]
    usual = [name for name in TIMESTEP_NAMES if name in changing]
    numbers = [name for name in changing if torch.as_tensor(first[name]).numel() == 1]
    if not (usual or numbers):
        raise uncertain(pipe, "none of its denoiser's arguments follows the timestep")
    return (usual or numbers)[0]


def moved(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and not torch.equal(one, other)
    return is_number(one) and one != other


def relation_of_timesteps(pipe: Any, arguments: Arguments, steps: list[Seen]) -> tuple[float, float]:
    """(scale, offset) of the line from the scheduler's timesteps to the denoiser's.

    Raises:
        UserError: they are not on a line.
    """
    pairs = [(step.timestep, float(arguments.timesteps(step.calls[0].inputs, 1))) for step in steps]
    for scale, offset in SCALES_OF_TIMESTEPS:
        if _on_line(pairs, scale, offset):
            return scale, offset
    (t0, d0), (t1, d1) = pairs[0], pairs[-1]
    if t0 != t1:
        scale = (d1 - d0) / (t1 - t0)
        if scale and _on_line(pairs, scale, d0 - scale * t0):
            return scale, d0 - scale * t0
    raise uncertain(pipe, "its denoiser's timesteps do not follow from the scheduler's by a scale and an offset")


def _on_line(pairs: list[tuple[float, float]], scale: float, offset: float) -> bool:
    reach = max(abs(denoiser) for _, denoiser in pairs) or 1.0
    return all(abs(scale * scheduler + offset - denoiser) <= ON_SCALE * reach for scheduler, denoiser in pairs)
