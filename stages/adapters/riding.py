"""What an adapter has put on a denoiser: hooks on its modules, or one scale in its weights."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.fusing import FusedWeights, LowRank

RIDE = "_guidance_ride"  # among a denoiser's attributes


@dataclass(frozen=True)
class Fused:
    """What weights hold: the change at one scale, so many times."""

    guidance_scale: float
    strength: float = 1.0


class Ride:
    """It lies on the denoiser itself, so that a deep copy of the denoiser has one of its own.

    Attributes:
        handles: of the hooks that are there.
        fused: what the weights hold; None where they are the base's own.
        lock: held for the time of a pipeline's call, because calls at two scales cannot share the weights.
    """

    def __init__(self, backup_device: str | torch.device | None) -> None:
        self.backup_device = backup_device
        self.handles: list[RemovableHandle] = []
        self.fused: Fused | None = None
        self.weights: FusedWeights | None = None
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> Ride:
        """A copy shares the lock, because the adapter that rides on both has one guidance in force."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo), lock=self.lock)
        return copied

    def put(self, denoiser: nn.Module, fused: Fused, change: LowRank) -> None:
        """Fuse; interrupted, the base's own weights are back."""
        self.weights = self.weights or FusedWeights(denoiser, list(change), self.backup_device)
        self.weights.check_unchanged()
        try:
            self.weights.put(change, fused.strength)
        except BaseException:
            self.weights.put_back()
            self.weights = self.fused = None
            raise
        self.fused = fused

    def restore(self, held: Fused | None = None) -> None:
        """The base's own weights, which is also what a scale of 1 holds."""
        if self.weights is not None:
            self.weights.restore()
        self.weights, self.fused = None, held

    def unhook(self) -> bool:
        """Whether there were hooks."""
        hooked = bool(self.handles)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        return hooked


def begin_ride(denoiser: nn.Module, backup_device: str | torch.device | None) -> None:
    vars(denoiser)[RIDE] = Ride(backup_device)


def end_ride(denoiser: nn.Module) -> None:
    """Leave a denoiser as it was."""
    ride = ride_of(denoiser)
    ride.unhook()
    del vars(denoiser)[RIDE]
    ride.restore()


def is_ridden(denoiser: nn.Module) -> bool:
    """Whether an adapter rides on it; a deep copy has a ride of its own."""
    return RIDE in vars(denoiser)


def ride_of(denoiser: nn.Module) -> Ride:
    ride = vars(denoiser)[RIDE]
    assert isinstance(ride, Ride)
    return ride
