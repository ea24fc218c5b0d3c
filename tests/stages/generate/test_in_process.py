from __future__ import annotations

from pathlib import Path

from stages.errors import UserError
from stages.generate.driver import Failed, Loaded, Made
from stages.generate.in_process import InProcessFleet
from tests.conftest import generate_config


def test_it_loads_then_makes_what_is_dispatched(tiny_teacher: Path, tmp_path: Path) -> None:
    fleet = InProcessFleet(generate_config(tiny_teacher, tmp_path))
    assert fleet.idle() == 0
    assert isinstance(fleet.poll(1)[0], Loaded)
    assert fleet.idle() == 1
    fleet.dispatch(3)
    assert fleet.idle() == 0
    assert fleet.poll(1) == [Made(3, 12)]
    assert fleet.idle() == 1


def test_a_failure_is_an_event(tmp_path: Path) -> None:
    (event,) = InProcessFleet(generate_config(tmp_path / "missing", tmp_path)).poll(1)
    assert isinstance(event, Failed)
    assert isinstance(event.error, UserError)
