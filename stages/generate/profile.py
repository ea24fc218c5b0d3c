"""Where the time of a run went: what `generation.json` tells of it, so that a slow run can be mended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stages.generate.events import Event, Failed, Loaded, Made

TEACHER, RECORDING, ENCODING, WRITING = "teacher", "recording", "encoding", "writing"


class Clock(Counter[str]):
    """Seconds by what they were spent on."""

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self[what] += time.perf_counter() - start  # type: ignore[assignment]


class Profile:
    """Adds up what workers tell of their units, and how long each was there for."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.units: Counter[str] = Counter()
        self.records: Counter[str] = Counter()
        self.since: dict[str, float] = {}
        self.present = 0.0
        self.lost = self.preempted = 0

    def see(self, event: Event) -> None:
        match event:
            case Loaded():
                self.since[event.worker] = time.monotonic()
            case Made():
                self.seconds.update(event.seconds)
                self.units[event.worker] += 1
                self.records[event.worker] += event.records
            case Failed() if event.lost and event.worker in self.since:
                self.lost += 1
                self.preempted += event.preempted
                self._leave(event.worker)

    def _leave(self, worker: str) -> None:
        self.present += time.monotonic() - self.since.pop(worker)

    def summary(self) -> dict[str, Any]:
        """Seconds of all workers together, those with the teacher as a share of those with a teacher loaded, and who made what.

        Encoding and writing go on beside the teacher; `waiting` is what a worker spent neither with the teacher nor on recording.
        """
        for worker in list(self.since):
            self._leave(worker)
        shares = {what: self.seconds[what] for what in (TEACHER, RECORDING, ENCODING, WRITING)}
        waiting = max(0.0, self.present - shares[TEACHER] - shares[RECORDING])
        return {
            "profile": shares
            | {"waiting": waiting, "teacher_share": shares[TEACHER] / self.present if self.present else 0.0},
            "workers": {
                name: {"units": self.units[name], "records": self.records[name]} for name in sorted(self.units)
            },
            "workers_lost": self.lost,
            "workers_preempted": self.preempted,
        }
