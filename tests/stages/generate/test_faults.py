"""Faults injected into real workers.

No committed unit is lost, and none is made twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.errors import StorageError, UserError
from stages.generate.driver import Driver
from stages.generate.fleet import RayFleet
from stages.generate.in_process import InProcessFleet
from stages.records.dataset import Dataset
from stages.records.verification import verify
from tests.conftest import fill, generate, generate_config
from tests.stages.generate.test_driver import assert_same_records
from tests.support.faults_table import survived
from tests.support.faulty_worker import (
    AFTER_COMMIT,
    BEFORE_COMMIT,
    BEFORE_WRITE,
    DURING_WRITE,
    FILL_MEMORY,
    HANG,
    JUMP,
    KILL,
    LOADING,
    RAISE,
    SAMPLING,
    STARTING,
    Faults,
    FaultyFleet,
    all_survived,
    happened,
    jumping_clock,
    write_faults,
)
from tests.support.sleeping_worker import NeverStarts

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]
UNITS = {"num_trajectories": 24, "num_workers": 2}  # eight units of three trajectories


@pytest.fixture(scope="module")
def undisturbed(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(generate_config(tiny_teacher, tmp_path_factory.mktemp("undisturbed"), **UNITS))


def run_with(faults: Faults, teacher: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    write_faults(folder, faults)
    config = generate_config(teacher, folder / "data", **UNITS | changes)
    return Driver(config).run(FaultyFleet(config))


def assert_nothing_lost_or_twice(folder: Path, undisturbed: Path) -> None:
    assert verify(folder / "data")["ok"]
    assert_same_records(folder / "data", undisturbed)
    keys = Dataset(folder / "data").manifest["key"].to_pylist()
    assert len(keys) == len(set(keys))


def test_a_worker_killed_at_any_moment_of_a_unit_loses_nothing(
    tiny_teacher: Path, tmp_path: Path, undisturbed: Path
) -> None:
    moments = (SAMPLING, BEFORE_WRITE, DURING_WRITE, BEFORE_COMMIT, AFTER_COMMIT)
    faults: Faults = {moment: {unit: (KILL, 1)} for unit, moment in enumerate(moments)}
    faults[LOADING] = {0: (KILL, 1)}
    summary = run_with(faults, tiny_teacher, tmp_path)
    assert len(happened(tmp_path)) == 6
    assert (summary["units_committed"], summary["units_missing"], summary["quarantined"]) == (8, [], {})
    assert summary["workers_lost"] == 5
    assert_nothing_lost_or_twice(tmp_path, undisturbed)
    all_survived(faults, tmp_path)


def test_units_of_a_failing_worker_are_retried(
    tiny_teacher: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, no memory, hanging units; and clocks, the driver's and a worker's, that jump by days."""
    faults: Faults = {
        STARTING: {0: (RAISE, 1)},
        LOADING: {0: (RAISE, 1)},
        SAMPLING: {0: (JUMP, 1), 1: (RAISE, 2), 4: (FILL_MEMORY, 1)},
        DURING_WRITE: {2: (RAISE, 1), 3: (HANG, 1)},
    }
    monkeypatch.setattr(time, "time", jumping_clock())
    summary = run_with(faults, tiny_teacher, tmp_path, unit_timeout=15)
    monkeypatch.undo()
    assert len(happened(tmp_path)) == 8
    assert (summary["units_missing"], summary["workers_lost"]) == ([], 1)
    assert_nothing_lost_or_twice(tmp_path, undisturbed)
    all_survived(faults, tmp_path)
    survived("a clock that jumps by days", "driver")


class NeverStartingFleet(RayFleet):
    worker_class = NeverStarts  # type: ignore[assignment]


def test_a_worker_that_cannot_be_constructed_ends_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(
        UserError, match="no worker could load the teacher in 3 attempts: RayActorError: ImportError: no such library$"
    ):
        Driver(config).run(NeverStartingFleet(config))
    survived("an error in each constructor: one-line error", "worker")


def test_a_disk_that_is_full_for_a_while(tiny_teacher: Path, small_disk: Path, undisturbed: Path) -> None:
    config = generate_config(tiny_teacher, small_disk / "data", **UNITS | {"num_workers": 1})
    write_faults(small_disk, {})
    ballast = fill(small_disk, 1 << 16)  # for some of the shards
    with pytest.raises(StorageError, match="No space left.*; once that is mended, the same command goes on"):
        Driver(config).run(FaultyFleet(config))
    assert 0 < len(list((small_disk / "data" / "commits").iterdir())) < 8
    ballast.unlink()
    Driver(config).run(InProcessFleet(config))
    assert_nothing_lost_or_twice(small_disk, undisturbed)
    survived("a full disk, under Ray", "storage")


def test_a_unit_that_always_kills_its_worker_is_quarantined_alone(
    tiny_teacher: Path, tmp_path: Path, undisturbed: Path
) -> None:
    always = 99
    faults: Faults = {SAMPLING: {3: (KILL, always)}, DURING_WRITE: {5: (RAISE, always)}}
    with pytest.raises(UserError, match=r"2 of 8 units are missing after 3 attempts each"):
        run_with(faults, tiny_teacher, tmp_path)
    assert [name for name in happened(tmp_path) if name.startswith(SAMPLING)] == [f"{SAMPLING}-3-{i}" for i in range(3)]
    (left := verify(tmp_path / "data"))["ok"]
    assert left["problems"][0]["found"] == "6, without 00003, 00005"
    config = generate_config(tiny_teacher, tmp_path / "data", **UNITS)
    assert Driver(config).run(InProcessFleet(config))["units_missing"] == []
    assert_nothing_lost_or_twice(tmp_path, undisturbed)
    survived("a unit that kills each of its workers", "worker")
    survived("a unit that fails each time", "worker")


def test_nodes_that_die_stop_and_join(tiny_teacher: Path, tmp_path: Path, undisturbed: Path) -> None:
    overrides = [sys.executable, "-m", "tests.support.cluster_faults", str(tiny_teacher), str(tmp_path)]
    ran = subprocess.run(overrides, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    info = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))  # Ray prints there too
    assert (info["units_committed"], info["quarantined"], info["workers_lost"], info["workers_preempted"]) == (
        8,
        {},
        2,
        2,
    )
    assert info["shards"] == [9, 8]  # the late attempt lost, and removed its shard
    assert_nothing_lost_or_twice(tmp_path, undisturbed)
    for fault in ("dies in the middle of a unit", "stands still, and goes on later", "joins when none is left"):
        survived(f"a node that {fault}", "node")
