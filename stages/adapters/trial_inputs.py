"""The inputs of a trial forward: made up from shapes, and with one sample changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.adapters.inputs import Inputs, entries_of, is_mask
from stages.base.arguments import Axis

TIMESTEPS = (500.0, 300.0)  # of the scheduler: of unchanged and of changed samples


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor in nested arguments."""
    if isinstance(value, dict):
        return {name: map_tensors(change, each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(change, each) for each in value)
    return change(value) if isinstance(value, Tensor) else value


def to_meta(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta", dtype=torch.float32 if value.is_floating_point() else value.dtype)


@dataclass
class InputMaker:
    """Makes up inputs on the device and in the precision of a parameter of the denoiser.

    Attributes:
        timestep: the name of the denoiser's timestep; to_denoiser: converts the scheduler's timestep to the denoiser's.
    """

    like: Tensor
    timestep: str
    to_denoiser: Callable[[float], float]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def make(self, inputs: Inputs) -> Inputs:
        return {name: map_tensors(partial(self._make, name), value) for name, value in inputs.items()}

    def make_other(self, inputs: Inputs) -> Inputs:
        """Make other values for every sample."""
        return {name: map_tensors(partial(self._make_other, name), value) for name, value in inputs.items()}

    def _make(self, name: str, value: Tensor) -> Tensor:
        if not value.is_meta:
            plain = value.is_floating_point() and name != self.timestep
            return value.to(self.like.device, self.like.dtype if plain else value.dtype)
        if name == self.timestep:
            return torch.full_like(value, self.to_denoiser(TIMESTEPS[0]), device=self.like.device)
        if is_mask(name, value) or not value.is_floating_point():  # class or token 0
            return torch.full_like(value, float(is_mask(name, value)), device=self.like.device)
        return self._draw(value)

    def _make_other(self, name: str, value: Tensor) -> Tensor:
        if name == self.timestep:
            return torch.full_like(value, self.to_denoiser(TIMESTEPS[1]), device=self.like.device)
        if is_mask(name, value) or not value.is_floating_point():
            return self._make(name, value)
        return self._draw(value)

    def _draw(self, value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=self.generator).to(self.like.device, self.like.dtype)


def swap_sample(one: Inputs, other: Inputs, sample: int, places: dict[str, Axis]) -> Inputs:
    """Replace one sample of flat arguments by that of others."""
    changed = dict(one)
    for name, place in places.items():
        if place.listed:
            changed |= {key: other[key] for key in entries_of(one, name, sample)}
        elif name in one and not place.shared:
            rows = range(sample * place.rows, (sample + 1) * place.rows)
            index = torch.tensor(rows, device=one[name].device)
            changed[name] = one[name].index_copy(place.dim, index, other[name].index_select(place.dim, index))
    return changed
