"""Real Ray, real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.generate.driver import Driver
from stages.generate.events import Event, Failed
from stages.generate.fleet import RayFleet
from stages.records.verification import verify
from tests.conftest import generate_config
from tests.stages.generate.test_driver import assert_same_records

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_one_worker_makes_the_records_of_the_twin(tiny_teacher: Path, shared_dataset: Path, tmp_path: Path) -> None:
    """Two of them do so in test_faults.py, whatever happens to them."""
    config = generate_config(tiny_teacher, tmp_path)
    summary = Driver(config).run(RayFleet(config))
    assert (summary["trajectories"], summary["records"], summary["units_committed"]) == (12, 48, 4)
    assert verify(tmp_path)["ok"]
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
