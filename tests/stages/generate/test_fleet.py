"""Real Ray, real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.exceptions import RuntimeEnvSetupError

from stages.errors import UserError
from stages.generate import fleet
from stages.generate.driver import Driver
from stages.generate.events import Event, Failed, Loaded
from stages.generate.fleet import MAX_MESSAGE_LENGTH, RayFleet, ray_error_of, start_ray
from stages.records.verification import verify
from tests.conftest import generate_config
from tests.stages.generate.test_driver import assert_same_records
from tests.support.sleeping_worker import KilledOnce, Placed, Refuses, sleeping_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_one_worker_makes_the_records_of_the_in_process_fleet(
    tiny_teacher: Path, shared_dataset: Path, tmp_path: Path
) -> None:
    """test_faults.py tests two workers, with faults."""
    config = generate_config(tiny_teacher, tmp_path)
    summary = Driver(config).run(RayFleet(config))
    assert (summary["trajectories"], summary["records"], summary["units_committed"]) == (12, 48, 4)
    assert verify(tmp_path)["ok"]
    assert_same_records(tmp_path, shared_dataset)


class RefusingFleet(RayFleet):
    worker_class = Refuses  # type: ignore[assignment]


def test_an_error_of_a_worker_keeps_its_message(tmp_path: Path) -> None:
    fleet = RefusingFleet(sleeping_config(tmp_path / "missing", tmp_path, 0, units=1))
    fleet.start({"class_label": 0})
    events: list[Event] = []
    while not events:
        events = fleet.poll(1)
    fleet.close()
    assert isinstance(events[0], Failed)
    assert isinstance(events[0].error, UserError)
    assert "missing" in str(events[0].error)


class KilledFleet(RayFleet):
    worker_class = KilledOnce  # type: ignore[assignment]


def test_a_killed_worker_is_replaced(tiny_teacher: Path, tmp_path: Path) -> None:
    """At every moment of a unit, with a real teacher: `make test-all`."""
    config = sleeping_config(tiny_teacher, tmp_path / "data", 0, units=3)
    summary = Driver(config).run(KilledFleet(config))
    assert (tmp_path / "killed").exists()
    assert (summary["units_committed"], summary["units_missing"], summary["workers_lost"]) == (3, [], 1)


class PlacedFleet(RayFleet):
    worker_class = Placed  # type: ignore[assignment]


def test_two_halves_of_a_gpu_and_other_resources_of_ray(tiny_teacher: Path, tmp_path: Path) -> None:
    config = replace(
        sleeping_config(tiny_teacher, tmp_path, 0, units=2, workers=2),
        num_gpus=0.5,
        resources={"teachers": 0.5},
        runtime_env={"env_vars": {"A_WORD": "passed on"}},
    )
    placed = PlacedFleet(config)
    placed.start({})
    events: list[Event] = []
    while len(events) < 2:
        events += placed.poll(1)
    names = ray.util.list_named_actors()
    placed.close()
    found = [event.facts for event in events if isinstance(event, Loaded)]
    assert found == 2 * [{"gpus": "0", "kept": {"CPU": 1.0, "GPU": 0.5, "teachers": 0.5}, "word": "passed on"}]
    assert sorted(names) == [f"teacher-{number}-of-run-{placed.run}" for number in (1, 2)]


def test_resources_that_ray_cannot_reserve_are_named(tiny_teacher: Path, tmp_path: Path) -> None:
    config = replace(generate_config(tiny_teacher, tmp_path), num_gpus=1.5)
    with pytest.raises(UserError, match="num_cpus=1 num_gpus=1.5: Ray cannot keep that for a worker: .*1.5"):
        RayFleet(config)


def test_resources_beyond_this_machine_are_refused_if_no_node_can_join(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(fleet, "join", lambda *_, **local: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray(generate_config(tiny_teacher, tmp_path, num_gpus=0.5, resources={"teachers": 1.0}))
    assert ended == []
    with pytest.raises(UserError, match=r"^num_cpus=1 num_gpus=0 resources.fast=1: more than this machine has"):
        start_ray(generate_config(tiny_teacher, tmp_path, resources={"fast": 1.0}))
    assert ended == [True]


def test_a_worker_that_cannot_start_is_a_one_line_error() -> None:
    missing = RuntimeEnvSetupError("no matching distribution\nfor nothing==1")
    assert "runtime_env: Failed to set up runtime environment. no matching distribution for nothing==1" in str(
        ray_error_of(missing)
    )
    assert "\n" not in str(ray_error_of(missing))
    assert len(str(ray_error_of(RuntimeEnvSetupError("x" * 9999)))) <= MAX_MESSAGE_LENGTH
    lost = ray.exceptions.ActorDiedError()
    assert ray_error_of(lost) is lost
