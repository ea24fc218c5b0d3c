"""A worker with injected faults, each once or every time, in a real process of Ray."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

from stages.base.sampling import Condition
from stages.generate.config import GenerateConfig
from stages.generate.fleet import RayFleet, TeacherWorker
from stages.generate.unit import Unit
from stages.storage.disk import DiskFolder
from tests.support.faults_table import survived

STOPPED_FILE = "stopped.json"
FAULTS_FILE = "faults.json"  # beside the dataset: {moment: {unit: [fault, times]}}
STARTING, LOADING, SAMPLING, BEFORE_WRITE, DURING_WRITE, BEFORE_COMMIT, AFTER_COMMIT = MOMENTS = (
    "starting", "loading", "sampling", "before_write", "during_write", "before_commit", "after_commit",
)  # fmt: skip
KILL, RAISE, HANG, SLOW, STOP_NODE, FILL_MEMORY, JUMP = (
    "kill", "raise", "hang", "slow", "stop_node", "fill_memory", "jump",
)  # fmt: skip
Faults = dict[str, dict[int, tuple[str, int]]]
DAYS = 86400.0
WORDS = {
    KILL: "SIGKILL", RAISE: "an error", HANG: "a hang", FILL_MEMORY: "no memory left", JUMP: "a clock that jumps",
    STARTING: "in the constructor", LOADING: "while the teacher is loaded", SAMPLING: "while the teacher samples",
    BEFORE_WRITE: "before the shard is written", DURING_WRITE: "in the middle of the shard",
    BEFORE_COMMIT: "before the commit", AFTER_COMMIT: "after the commit",
}  # fmt: skip


class InjectedError(RuntimeError):
    """An error of a unit."""


class FaultyFolder(DiskFolder):
    """A folder that injects faults between the bytes of a shard, and before and after its commit."""

    def __init__(self, address: str, worker: FaultyWorker) -> None:
        super().__init__(address)
        self.worker = worker

    @contextmanager
    def whole_file(self, name: str) -> Iterator[BinaryIO]:
        with super().whole_file(name) as file:
            yield file
            if name.startswith("shards/"):
                file.flush()
                self.worker.strike(DURING_WRITE)

    def create(self, name: str, content: bytes) -> bool:
        self.worker.strike(BEFORE_COMMIT)
        with self.worker.committing:
            won = super().create(name, content)
            self.worker.strike(AFTER_COMMIT)
        return won


class FaultyWorker(TeacherWorker):
    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config)
        self.place_of_faults = Path(config.output_dir).parent
        self.faults = json.loads((self.place_of_faults / FAULTS_FILE).read_text())
        self.thread = threading.local()  # several units may be written at once
        self.committing = threading.RLock()  # another unit's SIGKILL waits for it, or AFTER_COMMIT might never happen
        self.strike(STARTING, 0)

    def load(self, examples: Sequence[Condition]) -> dict[str, Any]:
        self.strike(LOADING, 0)
        facts = super().load(examples)
        self.root = FaultyFolder(self.config.output_dir, self)
        return facts

    def sample(self, unit: Unit) -> None:
        self.strike(SAMPLING, unit.index)
        super().sample(unit)

    def commit(self, index: int) -> tuple[int, dict[str, float]]:
        self.thread.writing = index
        self.strike(BEFORE_WRITE)
        return super().commit(index)

    def strike(self, moment: str, unit: int | None = None) -> None:
        """Inject the fault of a moment of a unit, by default of the unit being written."""
        unit = self.thread.writing if unit is None else unit
        fault, times = self.faults.get(moment, {}).get(str(unit), (None, 0))
        if fault is None or not self._take(f"{moment}-{unit}", times):
            return
        if fault == KILL:
            with self.committing:
                os.kill(os.getpid(), signal.SIGKILL)
        elif fault == HANG:
            time.sleep(3600)
        elif fault == SLOW:
            time.sleep(1)
        elif fault == STOP_NODE:
            self.stop_node()
        elif fault == FILL_MEMORY:
            fill_memory()
        elif fault == JUMP:
            time.time = jumping_clock()
        elif fault == RAISE:
            raise InjectedError(f"{moment} unit {unit}")

    def stop_node(self) -> None:
        """Stop this process and its node's, and write their process ids to a file for resuming them."""
        stopped = [os.getppid(), os.getpid()]
        (self.place_of_faults / STOPPED_FILE).write_text(json.dumps(stopped))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    def _take(self, name: str, times: int) -> bool:
        """Return whether a fault has yet to happen, counted over all workers."""
        for i in range(times):
            with suppress(FileExistsError):
                (self.place_of_faults / f"{name}-{i}").touch(exist_ok=False)
                return True
        return False


class FaultyFleet(RayFleet):
    worker_class = FaultyWorker


def fill_memory() -> None:
    """Allocate memory until the system refuses it to this process."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limits[1]))
    try:
        taken = []
        while True:
            taken.append(bytearray(16 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def jumping_clock() -> Callable[[], float]:
    """Return a `time.time` that jumps by days, forwards and backwards, at each call."""
    now, jumps = time.time, cycle([3 * DAYS, -5 * DAYS, 0.0, -400 * DAYS, 400 * DAYS])
    return lambda: now() + next(jumps)


def write_faults(folder: Path, faults: Faults) -> None:
    (folder / FAULTS_FILE).write_text(json.dumps(faults))


def happened(folder: Path) -> list[str]:
    """Return the faults that did happen, as `MOMENT-UNIT-NUMBER`."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(MOMENTS))


def all_survived(faults: Faults, folder: Path) -> None:
    """Record in the table each fault that did happen."""
    for name in happened(folder):
        moment, unit, _ = name.split("-")
        survived(f"{WORDS[faults[moment][int(unit)][0]]} {WORDS[moment]}", "worker")
