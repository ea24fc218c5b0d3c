"""Reading a denoiser's call: its number of samples, and their timesteps and conditions, sample first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.adapters.metadata import AdapterMetadata
from stages.base.arguments import Axis, argument, stacked
from stages.base.denoiser import MASK

Inputs = dict[str, Any]  # a denoiser's arguments, flat


@dataclass
class Samples:
    """The samples of one call.

    Attributes:
        count: the number of samples; device: of the latent.
        timestep: `[n]`, in the denoiser's own counting.
        conditions: the other arguments that belong to samples, `[n, ...]` by name.
        ragged: whether lists with one tensor for each sample hold tensors of different shapes.
    """

    count: int
    device: torch.device
    timestep: Tensor
    conditions: dict[str, Tensor]
    ragged: bool


def samples_of(flat: Inputs, latent: str, metadata: AdapterMetadata, wanted: bool = True) -> Samples:
    """Read a call.

    Args:
        flat: the denoiser's arguments; latent: the name of the latent among them.
        wanted: whether to read the conditions.
    """
    places = places_of(flat, latent, metadata)
    value = argument(flat, latent, places[latent])
    count = places[latent].of_samples(value)
    device = (value[0] if places[latent].listed else value).device
    timestep = of_each(torch.as_tensor(flat[metadata.timestep], device=device), count, metadata)
    others = {name: place for name, place in places.items() if name not in (latent, metadata.timestep)}
    conditions = dict(_conditions(flat, others, count)) if wanted else {}
    return Samples(
        count, device, timestep, conditions, any(_is_ragged(flat, name, place) for name, place in places.items())
    )


def of_each(timestep: Tensor, count: int, metadata: AdapterMetadata) -> Tensor:
    """Return each sample's timestep `[n]`; if tokens have their own, the noisiest, because others are held fixed."""
    if timestep.numel() == 1 or timestep.numel() % count:
        return timestep.flatten()[:1].expand(count)
    tokens = timestep.reshape(count, -1)
    if tokens.shape[1] == 1:
        return tokens[:, 0]
    return tokens.amax(1) if metadata.timestep_scale > 0 else tokens.amin(1)


def places_of(flat: Inputs, latent: str, metadata: AdapterMetadata) -> dict[str, Axis]:
    """Return where each argument has its samples, from the metadata, or else from shapes."""
    if axes := metadata.axes:
        return {name: Axis(**place) for name, place in axes.items()}
    listed = Axis(listed=True)
    first = Axis() if latent in flat else listed
    count = first.of_samples(argument(flat, latent, first))
    lists = {name.rpartition(".[")[0] for name in flat if name.endswith(f".[{count - 1}]")}
    found = {name: listed for name in lists if len(argument(flat, name, listed) or []) == count}
    for name, value in flat.items():
        if isinstance(value, Tensor) and value.ndim and name.rpartition(".[")[0] not in found:
            place = _place_of(value, count)
            found |= {} if place is None else {name: place}
    return {latent: first} | found


def _place_of(value: Tensor, count: int) -> Axis | None:
    if len(value) == count:
        return Axis()
    if value.ndim < 3 or not value.is_floating_point():
        return None
    if len(value) and len(value) % count == 0:
        return Axis(rows=len(value) // count)
    return Axis(dim=1) if value.shape[1] == count else None


def _conditions(flat: Inputs, places: dict[str, Axis], count: int) -> Iterator[tuple[str, Tensor]]:
    for name, place in places.items():
        value = argument(flat, name, place)
        if isinstance(value, Tensor) and not place.shared:  # a call may have another number of frames than the records
            place = replace(place, rows=value.shape[place.dim] // count)
        taken = None if value is None else place.taken(value, 0, count)
        if isinstance(taken, list):
            taken, lengths = stacked(taken)
            assert lengths is not None
            positions = torch.arange(taken.shape[1])
            yield name + MASK, (positions < lengths[:, None]).to(taken.device)
        if taken is not None:
            yield name, taken


def _is_ragged(flat: Inputs, name: str, place: Axis) -> bool:
    return place.listed and len({entry.shape for entry in argument(flat, name, place) or []}) > 1


def entries_of(flat: Inputs, name: str, sample: int) -> list[str]:
    """Return the flat names of a list's entry for a sample."""
    return [key for key in (f"{name}.[{sample}]",) if key in flat]


def is_mask(name: str, value: Tensor) -> bool:
    """Whether a tensor `[n, length]` may be a mask: integers and booleans by shape, floats also by name."""
    return value.ndim == 2 and (not value.is_floating_point() or "mask" in name)
