from __future__ import annotations

from pathlib import Path

from stages.errors import UserError
from stages.generate.events import Failed, Loaded, Made
from stages.generate.in_process import InProcessFleet
from tests.conftest import generate_config
from tests.stages.generate.test_unit import describe


def test_it_loads_then_makes_what_is_dispatched(tiny_teacher: Path, tmp_path: Path) -> None:
    fleet = InProcessFleet(generate_config(tiny_teacher, tmp_path))
    assert not fleet.free(alone=False)
    assert isinstance(fleet.poll(1)[0], Loaded)
    describe(fleet.worker)
    assert fleet.free(alone=True)
    fleet.dispatch(3, alone=False)
    assert not fleet.free(alone=False)
    (made,) = fleet.poll(1)
    assert isinstance(made, Made)
    assert (made.unit, made.records) == (3, 12)
    assert fleet.free(alone=False)


def test_a_failure_is_an_event(tmp_path: Path) -> None:
    (event,) = InProcessFleet(generate_config(tmp_path / "missing", tmp_path)).poll(1)
    assert isinstance(event, Failed)
    assert isinstance(event.error, UserError)
