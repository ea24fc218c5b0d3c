"""How far the driver scales: its share of a unit's time at up to 256 workers, its memory, and the time to resume.

python -m tests.benchmarks.scale [workers: 1,8,64,256] [units per worker] [units for memory] [commits for resuming]

Ray and its actors are real and run on this machine, with one declared core per actor. In place of sampling they sleep
for two seconds, and they commit to a real folder. No unit starts before all workers are loaded, so that their start is not
measured. Efficiency is units times two seconds over workers times the time from the first dispatch to the end.

Memory and resuming need no Ray, and are measured in fresh processes. One driver makes and publishes units of one
sample, with a fleet that commits each unit at once. Another starts with all units but one committed, and runs until it
dispatches the last.

Prints one JSON object; fails if a goal is missed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import psutil

from stages.base.sampling import Condition
from stages.generate.driver import Driver
from stages.generate.events import Event, Loaded, Made
from stages.generate.fleet import RayFleet
from stages.generate.unit import Unit
from stages.records.commits import commit_name
from stages.records.dataset import Dataset
from stages.storage.sealing import seal
from tests.support.sleeping_worker import FACTS, SleepingWorker, made_up_commit, sleeping_config

TEACHER = Path("stages/embedded/mnist_dit")
UNIT_SECONDS = 2.0
EFFICIENCY, MOST_WORKERS = 0.95, 64  # beyond these, workers starve the driver of cores, and no goal applies
MOST_BYTES, MOST_SECONDS = 1 << 30, 60.0


class SleepingFleet(RayFleet):
    """Waits until all workers are loaded, and measures the driver's time from then on."""

    worker_class = SleepingWorker  # type: ignore[assignment]
    begun: tuple[float, float] | None = None
    wall = cpu = 0.0
    worker_bytes = 0

    def free(self, alone: bool) -> bool:
        return (self.begun is not None or all(member.is_loaded for member in self.members)) and super().free(alone)

    def dispatch(self, unit: Unit, alone: bool) -> None:
        if self.begun is None:
            processes = psutil.Process().children(recursive=True)
            workers = [process for process in processes if "ray::SleepingWorker" in " ".join(process.cmdline())]
            self.worker_bytes = max(process.memory_full_info().uss for process in workers)
            self.begun = time.perf_counter(), time.process_time()
        super().dispatch(unit, alone)

    def close(self) -> None:
        if self.begun is not None:
            self.wall, self.cpu = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
        super().close()


def efficiency(root: Path, workers: int, units_per_worker: int, seconds: float = UNIT_SECONDS) -> dict[str, Any]:
    units, start = workers * units_per_worker, time.perf_counter()
    config = sleeping_config(TEACHER, root, seconds, units, workers)
    driver, fleet = Driver(config), SleepingFleet(config)
    assert driver.run(fleet)["units_committed"] == units
    return {
        "workers": workers,
        "units": units,
        "efficiency": round(units * seconds / (workers * fleet.wall), 4),
        "milliseconds_between_units": round(1000 * (workers * fleet.wall / units - seconds), 1),
        "driver_cpu_milliseconds_per_unit": round(1000 * fleet.cpu / units, 2),
        "worker_bytes": fleet.worker_bytes,
        "seconds_in_all": round(time.perf_counter() - start, 1),
    }


class StoppedError(Exception):
    pass


class MadeUpFleet:
    """Commits a unit as soon as it is dispatched, without syncing: a million syncs would take hours."""

    def __init__(self, root: Path, stops_at: int | None = None) -> None:
        self.root, self.stops_at, self.digest = root, stops_at, ""
        self.events: list[Event] = [Loaded(FACTS)]
        (root / "commits").mkdir(parents=True, exist_ok=True)

    def start(self, example: Condition) -> None:
        pass

    def free(self, alone: bool) -> bool:
        return not self.events

    def dispatch(self, unit: Unit, alone: bool) -> None:
        if unit.index == self.stops_at:
            raise StoppedError
        (self.root / commit_name(unit.index)).write_bytes(seal(made_up_commit(unit.index, unit.plan)))
        self.events.append(Made(unit.index, 1, "one"))

    def poll(self, timeout: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def states(self) -> Counter[str]:
        return Counter(["idle"])

    def close(self) -> None:
        pass


def resident(field: str) -> int:
    """Return the bytes of this process now (`VmRSS`), or their peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(root: Path, units: int) -> dict[str, Any]:
    """Return the memory of a run, above that of the process before it."""
    config = sleeping_config(TEACHER, root, 0.0, units)
    before, start = resident("VmRSS"), time.perf_counter()
    driver = Driver(config)
    planned, planned_in = resident("VmRSS") - before, time.perf_counter() - start
    driver.run(MadeUpFleet(root))
    return {
        "units": units,
        "bytes_planned": planned,
        "bytes_at_the_peak": resident("VmHWM") - before,
        "seconds_to_plan": round(planned_in, 2),
        "seconds_in_all": round(time.perf_counter() - start, 1),
    }


def run_up_to(root: Path, unit: int) -> float:
    """Return the seconds until a driver dispatches a unit after making all earlier ones; it stops there."""
    config = sleeping_config(TEACHER, root, 0.0, unit + 1)
    start = time.perf_counter()
    with suppress(StoppedError):
        Driver(config).run(MadeUpFleet(root, stops_at=unit))
    return time.perf_counter() - start


def silent(work: Any, *given: Any) -> Any:
    """Run without the driver's line for each unit."""
    with Path(os.devnull).open("w") as sink, redirect_stderr(sink):
        return work(*given)


def fresh(work: Any, *given: Any) -> Any:
    """Return the result of a function that runs in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(silent, work, *given).result()


def carried(root: Path, units: int) -> dict[str, Any]:
    info = fresh(memory, root, units)
    assert len(Dataset(root, check_sizes=False).manifest) == units
    return info


def resumed(root: Path, commits: int) -> dict[str, Any]:
    """Return the seconds from `Driver(config)` to the first dispatch, with one unit left after this many commits."""
    fresh(run_up_to, root, commits)
    return {"commits": commits, "seconds_to_resume": round(fresh(run_up_to, root, commits), 2)}


def missed(info: dict[str, Any]) -> list[str]:
    """Return the goals that are missed."""
    goals = [
        f"{one['workers']} workers: an efficiency of {one['efficiency']}"
        for one in info["workers"]
        if one["workers"] <= MOST_WORKERS and one["efficiency"] < EFFICIENCY
    ]
    if info.get("memory", {}).get("bytes_at_the_peak", 0) > MOST_BYTES:
        goals.append("memory")
    if info.get("resume", {}).get("seconds_to_resume", 0) > MOST_SECONDS:
        goals.append("time to resume")
    return goals


def main(workers: str = "1,8,64,256", each: str = "10", units: str = "1000000", commits: str = "100000") -> None:
    info: dict[str, Any] = {"workers": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        info["workers"] = [efficiency(root / count, int(count), int(each)) for count in workers.split(",")]
        info["memory"] = carried(root / "memory", int(units))
        info["resume"] = resumed(root / "resume", int(commits))
        print(json.dumps(info, indent=2))
    if goals := missed(info):
        sys.exit(f"error: goals are missed: {', '.join(goals)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
