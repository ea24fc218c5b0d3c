"""What can happen to a worker, made to happen to real ones: nothing that is committed is lost, and nothing is there twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.generate.driver import Driver
from stages.records.dataset import Dataset
from stages.records.verification import verify
from tests.conftest import generate, generate_config
from tests.faulty_worker import (
    AFTER_COMMIT,
    BEFORE_COMMIT,
    BEFORE_WRITE,
    DURING_WRITE,
    HANG,
    KILL,
    LOADING,
    RAISE,
    SAMPLING,
    Faults,
    FaultyFleet,
    happened,
    write_faults,
)
from tests.stages.generate.test_driver import assert_same_records

pytestmark = pytest.mark.usefixtures("ray_cluster")
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
    summary = run_with(faults | {LOADING: {0: (KILL, 1)}}, tiny_teacher, tmp_path)
    assert len(happened(tmp_path)) == 6
    assert (summary["units_committed"], summary["units_missing"], summary["quarantined"]) == (8, [], {})
    assert summary["workers_lost"] == 5
    assert_nothing_lost_or_twice(tmp_path, undisturbed)


def test_errors_and_hung_units_are_tried_again(tiny_teacher: Path, tmp_path: Path, undisturbed: Path) -> None:
    faults: Faults = {
        LOADING: {0: (RAISE, 1)},
        SAMPLING: {1: (RAISE, 2)},
        DURING_WRITE: {2: (RAISE, 1), 3: (HANG, 1)},
    }
    summary = run_with(faults, tiny_teacher, tmp_path, unit_timeout=15)
    assert len(happened(tmp_path)) == 5
    assert (summary["units_missing"], summary["workers_lost"]) == ([], 1)
    assert_nothing_lost_or_twice(tmp_path, undisturbed)


def test_a_unit_that_always_kills_is_quarantined_and_takes_no_other_along(
    tiny_teacher: Path, tmp_path: Path, undisturbed: Path
) -> None:
    always = 99
    faults: Faults = {SAMPLING: {3: (KILL, always)}, DURING_WRITE: {5: (RAISE, always)}}
    with pytest.raises(UserError, match=r"2 of 8 units are missing after 3 attempts each"):
        run_with(faults, tiny_teacher, tmp_path)
    assert [name for name in happened(tmp_path) if name.startswith(SAMPLING)] == [f"{SAMPLING}-3-{i}" for i in range(3)]
    (left := verify(tmp_path / "data"))["ok"]
    assert left["problems"][0]["found"] == "6, without 00003, 00005"
    summary = run_with({}, tiny_teacher, tmp_path)
    assert summary["units_missing"] == []
    assert_nothing_lost_or_twice(tmp_path, undisturbed)


def test_nodes_that_die_stand_still_and_join(tiny_teacher: Path, tmp_path: Path, undisturbed: Path) -> None:
    words = [sys.executable, "-m", "tests.cluster_faults", str(tiny_teacher), str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))  # Ray prints there too
    assert (told["units_committed"], told["quarantined"], told["workers_lost"], told["workers_preempted"]) == (
        8,
        {},
        2,
        2,
    )
    assert told["shards"] == [9, 8]  # what came late lost, and took its shard away
    assert_nothing_lost_or_twice(tmp_path, undisturbed)
