"""The profile of a run for `generation.json`: where its time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stages.generate.events import Event, Failed, Loaded, Made

TEACHER, RECORDING, ENCODING, WRITING = "teacher", "recording", "encoding", "writing"


class Clock(Counter[str]):
    """Seconds by activity."""

    @contextmanager
    def spent_on(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self[activity] += time.perf_counter() - start  # type: ignore[assignment]


class Profile:
    """Adds up the workers' times by activity, and the time for which each had its teacher loaded."""

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
        """The seconds of all workers by activity, the teacher's share of their time, and each worker's output.

        Encoding and writing overlap with the teacher; `waiting` is time spent neither in the teacher nor on recording.
        """
        for worker in list(self.since):
            self._leave(worker)
        spent = {activity: self.seconds[activity] for activity in (TEACHER, RECORDING, ENCODING, WRITING)}
        waiting = max(0.0, self.present - spent[TEACHER] - spent[RECORDING])
        return {
            "profile": spent
            | {"waiting": waiting, "teacher_share": spent[TEACHER] / self.present if self.present else 0.0},
            "workers": {
                name: {"units": self.units[name], "records": self.records[name]} for name in sorted(self.units)
            },
            "workers_lost": self.lost,
            "workers_preempted": self.preempted,
        }
