"""Progress of a run: one bar on a terminal, one line per unit in a log."""

from __future__ import annotations

import time
from collections import Counter

from tqdm import tqdm

from stages.base.loading import first_line
from stages.generate.config import place_of
from stages.generate.events import WAITING, Event, Failed, Loaded, Made
from stages.generate.plan import Plan
from stages.progress import progress
from stages.streams import standard_error

QUIET_SECONDS = 30.0  # after so long without an event, report the workers' states


class ProgressReporter:
    """Reports a fleet's events to the user.

    Args:
        committed: the numbers of units and of records that earlier runs made.
    """

    def __init__(self, plan: Plan, committed: tuple[int, int]) -> None:
        self.units, self.records = committed
        self.planned_units, self.planned_records = len(plan), plan.num_records
        self.before, self.start = self.records, time.monotonic()
        self.terminal = standard_error().isatty()
        self.last, self.place = self.start, place_of(plan.config)
        self.bar = progress(self.planned_records, "generate", "records", initial=self.records, shown=self.terminal)

    def see(self, event: Event, states: Counter[str]) -> None:
        self.last = time.monotonic()
        match event:
            case Loaded():
                self._line(f"{event.worker}: loaded")
            case Made():
                self.units += 1
                self.records += event.records
                self.bar.update(event.records)
                took = sum(event.seconds.values())
                self._line(
                    f"unit {event.unit:05d}: {event.records:,} records in {took:.1f} s by {event.worker}; {self._rest(states)}"
                )
            case Failed() if not event.ends_run:
                what = "loading" if event.unit is None else f"unit {event.unit:05d}"
                how = (
                    "its node went away"
                    if event.preempted
                    else f"{type(event.error).__name__}: {first_line(event.error)}"
                )
                self.say(f"{what}: failed at {event.worker}: {how}")

    def tick(self, states: Counter[str]) -> None:
        """Report the states after a while without events: the cluster may lack room for a worker."""
        self.bar.set_postfix_str(f"{self.units} of {self.planned_units} units, {summary_of(states)}", refresh=False)
        if time.monotonic() - self.last >= QUIET_SECONDS:
            self.last = time.monotonic()
            waits = f": the cluster has no room yet for {self.place}" if states[WAITING] else ""
            self.say(f"{self.units} of {self.planned_units} units; {summary_of(states)}{waits}")

    def _rest(self, states: Counter[str]) -> str:
        rate = (self.records - self.before) / max(time.monotonic() - self.start, 1e-9)
        left = tqdm.format_interval((self.planned_records - self.records) / rate) if rate else "?"
        return f"{self.units} of {self.planned_units} units, {rate:,.0f} records/s, {left} left; {summary_of(states)}"

    def _line(self, text: str) -> None:
        """Write a line to a log; on a terminal the bar shows the same."""
        if not self.terminal:
            self.say(text)

    def say(self, text: str) -> None:
        tqdm.write(text, file=standard_error())

    def close(self) -> None:
        self.bar.close()


def summary_of(states: Counter[str]) -> str:
    """`3 sampling, 1 loading`."""
    return ", ".join(f"{count} {state}" for state, count in states.items() if count)
