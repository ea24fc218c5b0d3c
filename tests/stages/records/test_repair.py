from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.generate.plan import Plan
from stages.generate.worker import UnitWorker
from stages.records.commits import commit_unit
from stages.records.dataset import Dataset
from stages.records.plans import snapshots
from stages.records.repair import repair
from stages.records.shard import encode
from stages.records.verification import survey, verify
from stages.storage import disk
from stages.storage.disk import DiskFolder
from stages.storage.folder import open_folder
from tests.conftest import generate, generate_config
from tests.stages.generate.test_driver import Faulty, assert_same_records
from tests.stages.records.test_trajectory import trajectory
from tests.support.damages import DAMAGES, commit_of, publish_again
from tests.support.faults_table import survived
from tests.support.made_up import PLAN

pytestmark = pytest.mark.usefixtures("layout_found_once")
DAY = 86400.0


def mend(root: Path, grace: float = DAY, deep: bool = True) -> list[dict[str, str]]:
    return repair(survey(open_folder(root), deep), grace)


def put(root: Path, name: str, age: float = 2 * DAY) -> str:
    """Write an orphan of this age in seconds."""
    (root / name).write_bytes(b"orphan")
    os.utime(root / name, (time.time() - age,) * 2)
    return name


def removed(done: list[dict[str, str]]) -> list[str]:
    return sorted(line["shard"] for line in done if line["done"].startswith("removed"))


def test_a_whole_dataset_is_left_unchanged(damaged: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in damaged.rglob("*.*")}
    assert mend(damaged, grace=0) == []
    assert {path: path.stat().st_mtime_ns for path in damaged.rglob("*.*")} == before


def test_orphans_are_no_problem_and_are_removed_when_old(damaged: Path) -> None:
    old = [
        put(damaged, name)
        for name in (
            ".dataset.json.0a1b2c3d.tmp",
            "commits/.00003.json.0a1b2c3d.tmp",
            "shards/.00002-0badcafe.tar.0a1b2c3d.tmp",
            "shards/00001-0badcafe.tar",
            "shards/00099-0badcafe.tar",
            "shards/by_hand.tar",
        )
    ]
    young = [put(damaged, "shards/00001-1badcafe.tar", 0), put(damaged, "shards/00002-0badcafe.tar", -9 * DAY)]
    found = verify(damaged)
    assert found["ok"]
    assert sorted(found["orphans"].pop("names")) == sorted(old + young)
    assert found["orphans"] == {"count": 8, "bytes": 48}
    assert removed(mend(damaged)) == sorted(old)
    assert sorted(verify(damaged)["orphans"]["names"]) == sorted(young)
    assert Dataset(damaged)
    survived("orphans of killed attempts", "dataset")


def test_an_orphan_that_may_be_in_flight_is_kept_under_any_clock(damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    one, other = Driver(config).todo
    names = f"shards/{one:05d}-0badcafe.tar", f"commits/.{other:05d}.json.0a1b2c3d.tmp"
    kept = [put(damaged, name, 999 * DAY) for name in names]
    assert mend(damaged, grace=0) == []
    assert sorted(verify(damaged)["orphans"]["names"]) == sorted(kept)
    Driver(config).run(InProcessFleet(config))
    assert removed(mend(damaged)) == sorted(kept)
    assert verify(damaged)["ok"]


def test_a_clock_of_this_machine_that_jumps_removes_nothing(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(damaged, "shards/00001-0badcafe.tar", 60)
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 99 * DAY)
    assert mend(damaged) == []


def test_units_committed_between_survey_and_repair_are_kept(damaged: Path) -> None:
    found = survey(open_folder(damaged), deep=False)
    commit = commit_unit(open_folder(damaged), 9, [encode(trajectory())], PLAN)
    found.orphans[commit.shard] = commit.size
    assert repair(found, grace=0) == []
    assert (damaged / commit.shard).exists()


class KilledError(Exception):
    """Simulates a kill: nothing after it runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Raise before, within or after the n-th move, write or removal."""
    steps = iter(range(number + 1))

    def step() -> None:
        if next(steps, number) == number:
            raise KilledError

    real: dict[str, Any] = {"move": disk.move, "write": DiskFolder.write, "delete": DiskFolder.delete}

    def moved(path: Path, to: Path) -> bool:
        step()
        to.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, to)
        step()
        to.unlink()
        done = real["move"](path, to)
        step()
        return done

    def written(folder: DiskFolder, name: str, content: bytes) -> None:
        step()
        real["write"](folder, name, content)
        step()

    def deleted(folder: DiskFolder, name: str) -> None:
        step()
        real["delete"](folder, name)

    monkeypatch.setattr(disk, "move", moved)
    monkeypatch.setattr(DiskFolder, "write", written)
    monkeypatch.setattr(DiskFolder, "delete", deleted)


@pytest.mark.parametrize("number", range(12))
def test_a_repair_killed_at_any_moment_is_unfinished_and_continues(
    damaged: Path, shared_dataset: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Two units are set aside, commit record first: four moves with three moments each."""
    DAMAGES["a flipped bit in a payload"](damaged)
    (damaged / "commits" / "00003.json").write_bytes(b"{}")
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        with pytest.raises(KilledError):
            mend(damaged)
    assert not verify(damaged)["ok"]
    if len(list((damaged / "commits").iterdir())) < 4:
        with pytest.raises(UserError, match=r"unfinished, [23] of 4 units"):
            Dataset(damaged)
    mend(damaged)
    found = verify(damaged)
    assert [problem["found"] for problem in found["problems"]] == ["2, without 00001, 00003"]
    config = generate_config(tiny_teacher, damaged)
    Driver(config).run(InProcessFleet(config))
    assert verify(damaged)["ok"]
    assert_same_records(damaged, shared_dataset)
    assert Dataset(damaged).fingerprint == Dataset(shared_dataset).fingerprint
    survived("a repair killed at any moment", "dataset")


@pytest.mark.parametrize("number", range(6))
def test_a_repair_of_manifests_killed_at_any_moment_continues(
    damaged: Path, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for name in ("manifest.parquet", "manifests/1.parquet"):
        (damaged / name).write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        with pytest.raises(KilledError):
            mend(damaged)
    if number < 3:  # the last manifest is not written yet
        assert not verify(damaged)["ok"]
        with pytest.raises(UserError, match=r"manifest\.parquet: damaged"):
            Dataset(damaged)
    mend(damaged)
    assert verify(damaged)["ok"]
    assert Dataset(damaged).manifest.equals(Dataset(shared_dataset).manifest)


@pytest.mark.parametrize("name", ["dataset.json", "manifests/1.parquet", "manifest.parquet", "published"])
def test_units_made_again_are_unfinished_until_they_are_published(
    damaged: Path, tiny_teacher: Path, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A kill before each file that generation writes after a repair.

    Readers and `verify` find the dataset unfinished.
    """
    DAMAGES["a flipped bit in a payload"](damaged)
    mend(damaged)
    config = generate_config(tiny_teacher, damaged)
    write, written = DiskFolder.write, []

    def killed(folder: DiskFolder, file: str, content: bytes) -> None:
        written.append(file)
        if file == name or (name == "published" and written.count("dataset.json") == 2):
            raise KilledError
        write(folder, file, content)

    with monkeypatch.context() as patch:
        patch.setattr(DiskFolder, "write", killed)
        with pytest.raises(KilledError):
            Driver(config).run(InProcessFleet(config))
    with pytest.raises(UserError, match=r"unfinished, [34] of 4 units"):
        Dataset(damaged)
    found = "3, without 00001" if name == "dataset.json" else "4, not yet published"
    assert [problem["found"] for problem in verify(damaged)["problems"]] == [found]
    assert not Driver(config).finished
    Driver(config).run(InProcessFleet(config))
    assert verify(damaged)["ok"]
    assert Driver(config).finished
    assert_same_records(damaged, shared_dataset)


def test_a_repair_can_complete_a_publication(damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged)
    (damaged / "commits" / "00001.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=0))
    commit_unit(open_folder(damaged), 1, samples_of(config, 1), commit_of(damaged, 0)["plan"])
    assert mend(damaged, deep=False)[0]["done"] == "manifests written again from the commits"
    assert verify(damaged)["ok"]


def samples_of(config: Any, unit: int) -> list[Any]:
    plan, worker = Plan(config), UnitWorker(config)
    worker.load(plan.examples)
    worker.sample(plan.unit(unit))
    return [encode(part) for part in worker.sampled[unit].output.trajectories]


def test_a_manifest_is_repaired_while_a_plan_is_under_way(damaged: Path, tiny_teacher: Path) -> None:
    old = Dataset(damaged)
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    (damaged / "manifests" / "1.parquet").unlink()
    mend(damaged)
    assert Dataset(damaged).fingerprint == old.fingerprint
    assert verify(damaged)["ok"]
    Driver(config).run(InProcessFleet(config))
    assert snapshots(open_folder(damaged))[0] == old.fingerprint
    assert len(Dataset(damaged).manifest) == 20


def test_a_unit_of_an_older_snapshot_is_made_again_in_all(damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    generate(config)
    before = snapshots(open_folder(damaged))
    DAMAGES["a zeroed page"](damaged)
    mend(damaged)
    for snapshot in before:
        with pytest.raises(UserError, match="unfinished"):
            Dataset(damaged, snapshot=snapshot)
    generate(config)
    assert snapshots(open_folder(damaged)) == before
    assert verify(damaged)["ok"]


def test_without_depth_a_difference_is_not_judged(damaged: Path) -> None:
    DAMAGES["a manifest of other rows"](damaged)
    table = (damaged / "manifest.parquet").read_bytes()
    publish_again(damaged)
    info = survey(open_folder(damaged), deep=False)
    info.differences = [{"shard": commit_of(damaged)["shard"], "expected": "", "found": ""}]
    assert repair(info, DAY) == []
    assert (damaged / "manifest.parquet").read_bytes() != table


def test_a_commit_beyond_the_plan_is_set_aside_with_its_shard(damaged: Path) -> None:
    commit = commit_unit(open_folder(damaged), 9, [encode(trajectory())], PLAN)
    assert [line["shard"] for line in mend(damaged)] == ["commits/00009.json", commit.shard]
    assert (damaged / "quarantine" / commit.shard).exists()
    assert verify(damaged)["ok"]
