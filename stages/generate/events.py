"""The messages between the driver and a fleet of workers, wherever they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stages.base.sampling import Condition
from stages.errors import UserError
from stages.generate.unit import Unit

WAITING = "waiting for a place"  # the state of a worker until the cluster has room for it
EVALUATIONS = "evaluations"  # beside the teacher's facts: of its denoiser, for one trajectory


@dataclass(frozen=True)
class Loaded:
    """A worker has loaded its teacher; `facts` is `TeacherFacts` as JSON, with `EVALUATIONS`."""

    facts: dict[str, Any]
    worker: str = ""


@dataclass(frozen=True)
class Made:
    """A unit is committed; `seconds` is its worker's time by activity."""

    unit: int
    records: int
    worker: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A worker failed at a unit, or at loading if `unit` is None.

    Attributes:
        preempted: its node went away; the unit is not the cause.
        lost: the worker is gone too; the fleet replaces it.
    """

    unit: int | None
    error: BaseException
    preempted: bool = False
    worker: str = ""
    lost: bool = False

    @property
    def ends_run(self) -> bool:
        """Whether the teacher cannot be loaded anywhere as it is configured; the error is then the command's."""
        return self.unit is None and isinstance(self.error, UserError)


Event = Loaded | Made | Failed


class Fleet(Protocol):
    """Workers, wherever they run. A worker may sample a unit while it writes the previous one."""

    def start(self, examples: Sequence[Condition]) -> None:
        """Have every worker load its teacher, with a condition of each size for trial runs. Call this first."""

    def free(self, alone: bool) -> bool:
        """Whether a worker can take a unit now; if `alone`, a worker without other work."""

    def dispatch(self, unit: Unit, alone: bool) -> None:
        """Send a unit to a free worker; if `alone`, the worker gets no other until this one is written."""

    def poll(self, timeout: float) -> list[Event]:
        """The events since the last call; waits up to `timeout` seconds for the first."""

    def states(self) -> Counter[str]:
        """The number of workers in each state."""

    def close(self) -> None:
        """Stop every worker."""
