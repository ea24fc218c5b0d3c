"""Real Ray, real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from stages.errors import UserError
from stages.generate.driver import Driver
from stages.generate.events import Event, Failed
from stages.generate.fleet import RayFleet
from stages.records.verification import verify
from tests.conftest import generate_config
from tests.stages.generate.test_driver import assert_same_records

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_makes_the_records_of_the_twin(
    tiny_teacher: Path, shared_dataset: Path, tmp_path: Path, num_workers: int
) -> None:
    config = generate_config(tiny_teacher, tmp_path, num_workers=num_workers)
    summary = Driver(config).run(RayFleet(config))
    assert (summary["trajectories"], summary["records"], summary["units_committed"]) == (12, 48, 4)
    assert verify(tmp_path)["ok"]
    assert_same_records(tmp_path, shared_dataset)


class KillsAWorker(RayFleet):
    """Kills the process of the first worker that loads, as soon as a unit was dispatched to it."""

    killed = 0

    def dispatch(self, unit: int, alone: bool) -> None:
        super().dispatch(unit, alone)
        if not self.killed:
            workers = [
                p for p in psutil.process_iter(["cmdline"]) if "ray::TeacherWorker" in " ".join(p.info["cmdline"] or [])
            ]
            assert workers
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
            self.killed += 1


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    tiny_teacher: Path, shared_dataset: Path, tmp_path: Path
) -> None:
    config = generate_config(tiny_teacher, tmp_path, num_workers=1)
    fleet = KillsAWorker(config)
    summary = Driver(config).run(fleet)
    assert fleet.killed == 1
    assert (summary["units_committed"], summary["units_quarantined"]) == (4, 0)
    assert_same_records(tmp_path, shared_dataset)


def test_an_error_of_a_worker_keeps_its_line(tmp_path: Path) -> None:
    fleet = RayFleet(generate_config(tmp_path / "missing", tmp_path))
    events: list[Event] = []
    while not events:
        events = fleet.poll(1)
    fleet.close()
    assert isinstance(events[0], Failed)
    assert isinstance(events[0].error, UserError)
    assert "missing" in str(events[0].error)
