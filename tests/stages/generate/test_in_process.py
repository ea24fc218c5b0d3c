from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stages.errors import UserError
from stages.generate.events import Failed, Loaded, Made
from stages.generate.in_process import InProcessFleet
from stages.generate.plan import Plan
from tests.conftest import generate_config
from tests.stages.generate.test_worker import describe


def test_it_loads_then_makes_the_dispatched_units(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    fleet, plan = InProcessFleet(config), Plan(config)
    fleet.start(plan.examples)
    assert not fleet.free(alone=False)
    (loaded,) = fleet.poll(1)
    assert isinstance(loaded, Loaded)
    digest = describe(plan, loaded.facts)
    assert fleet.free(alone=True)
    fleet.dispatch(replace(plan.unit(3), plan=digest), alone=False)
    assert not fleet.free(alone=False)
    (made,) = fleet.poll(1)
    assert isinstance(made, Made)
    assert (made.unit, made.records) == (3, 12)
    assert fleet.free(alone=False)


def test_a_failure_is_an_event(tmp_path: Path) -> None:
    fleet = InProcessFleet(generate_config(tmp_path / "missing", tmp_path))
    fleet.start([{"class_label": 0}])
    (event,) = fleet.poll(1)
    assert isinstance(event, Failed)
    assert isinstance(event.error, UserError)
