"""A worker to which what can happen to one happens, each fault once or for ever, in a real process of Ray."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stages.generate.config import GenerateConfig
from stages.generate.fleet import RayFleet, TeacherWorker
from stages.records.folder import DiskFolder

STOPPED_FILE = "stopped.json"
FAULTS_FILE = "faults.json"  # beside the dataset: {moment: {unit: [what, how often]}}
LOADING, SAMPLING, BEFORE_WRITE, DURING_WRITE, BEFORE_COMMIT, AFTER_COMMIT = (
    "loading", "sampling", "before_write", "during_write", "before_commit", "after_commit",
)  # fmt: skip
KILL, RAISE, HANG, SLOW, STOP_NODE = "kill", "raise", "hang", "slow", "stop_node"
Faults = dict[str, dict[int, tuple[str, int]]]


class InjectedError(RuntimeError):
    """An error of a unit."""


class FaultyFolder(DiskFolder):
    """A folder whose worker can be struck between the bytes of a shard, and before and after its commit."""

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
        won = super().create(name, content)
        self.worker.strike(AFTER_COMMIT)
        return won


class FaultyWorker(TeacherWorker):
    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config)
        self.place_of_faults = Path(config.output_dir).parent
        self.faults = json.loads((self.place_of_faults / FAULTS_FILE).read_text())
        self.writing: int | None = None

    def load(self) -> dict[str, Any]:
        self.strike(LOADING, 0)
        facts = super().load()
        self.root = FaultyFolder(self.config.output_dir, self)
        return facts

    def sample(self, index: int) -> None:
        self.strike(SAMPLING, index)
        super().sample(index)

    def commit(self, index: int) -> tuple[int, dict[str, float]]:
        self.writing = index
        self.strike(BEFORE_WRITE)
        return super().commit(index)

    def strike(self, moment: str, unit: int | None = None) -> None:
        """Let happen what is to happen at a moment of a unit, by default of the one that is written."""
        unit = self.writing if unit is None else unit
        what, times = self.faults.get(moment, {}).get(str(unit), (None, 0))
        if what is None or not self._take(f"{moment}-{unit}", times):
            return
        if what == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == HANG:
            time.sleep(3600)
        elif what == SLOW:
            time.sleep(1)
        elif what == STOP_NODE:
            self.stop_node()
        elif what == RAISE:
            raise InjectedError(f"{moment} unit {unit}")

    def stop_node(self) -> None:
        """Stop this process and that of its node; who lets them go on finds their numbers in a file."""
        stopped = [os.getppid(), os.getpid()]
        (self.place_of_faults / STOPPED_FILE).write_text(json.dumps(stopped))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    def _take(self, name: str, times: int) -> bool:
        """Whether a fault has yet to happen, over all workers."""
        for i in range(times):
            with suppress(FileExistsError):
                (self.place_of_faults / f"{name}-{i}").touch(exist_ok=False)
                return True
        return False


class FaultyFleet(RayFleet):
    worker_class = FaultyWorker


def write_faults(folder: Path, faults: Faults) -> None:
    (folder / FAULTS_FILE).write_text(json.dumps(faults))


def happened(folder: Path) -> list[str]:
    """The faults that did happen: `MOMENT-UNIT-NUMBER`."""
    moments = (LOADING, SAMPLING, BEFORE_WRITE, DURING_WRITE, BEFORE_COMMIT, AFTER_COMMIT)
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(moments))
