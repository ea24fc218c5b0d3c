"""What passes between the driver and its workers, wherever these run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from stages.base.sampling import Condition
from stages.generate.facts import TeacherFacts
from stages.generate.planned import Unit

WAITING = "waiting for a place"  # the state of a worker for which the cluster has no room yet


@dataclass(frozen=True)
class Loaded:
    """A worker has loaded its teacher."""

    facts: TeacherFacts
    worker: str = ""


@dataclass(frozen=True)
class Made:
    """A unit is committed; `seconds` is what its worker spent on it, by what on."""

    unit: int
    records: int
    worker: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A worker failed at a unit, or, where `unit` is None, at loading.

    Attributes:
        preempted: its node went away: nothing that the unit did.
        lost: the worker is gone with it, and another takes its place.
    """

    unit: int | None
    error: BaseException
    preempted: bool = False
    worker: str = ""
    lost: bool = False


Event = Loaded | Made | Failed


class Fleet(Protocol):
    """Workers, wherever they run. A worker samples one unit while it still writes the one before."""

    def start(self, example: Condition) -> None:
        """Have every worker load its teacher and try it out on a condition; comes first."""

    def free(self, alone: bool) -> bool:
        """Whether a unit can be dispatched now; `alone`, to a worker that does nothing else."""

    def dispatch(self, unit: Unit, alone: bool) -> None:
        """Give a unit to a free worker; `alone`, it gets no other before this one is written."""

    def poll(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits at most `timeout` seconds for it."""

    def states(self) -> Counter[str]:
        """How many workers do what, in words."""

    def close(self) -> None:
        """Stop every worker."""
