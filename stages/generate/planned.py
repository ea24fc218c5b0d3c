"""The work that the driver sends to a worker. The file imports no torch, so that a worker can be light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.base.sampling import Condition


@dataclass(frozen=True)
class PlannedTrajectory:
    """What the plan decides about a trajectory; `steps` are the numbers of the steps to record, None for all."""

    index: int
    seed: int
    guidance_scale: float
    condition: Condition
    steps: list[int] | None = None


@dataclass(frozen=True)
class Unit:
    """The work that makes one shard.

    Attributes:
        index: the unit's number in the dataset.
        shift: how far its timestep grid is moved, in [0, 1) of the grid's spacing.
        plan: the digest of the plan that the unit belongs to, as `plan_digests` has it; None until `dataset.json`
            describes it.
    """

    index: int
    trajectories: list[PlannedTrajectory]
    shift: float
    plan: str | None = None
