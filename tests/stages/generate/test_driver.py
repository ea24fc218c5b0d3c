from __future__ import annotations

import json
import re
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.base.sampling import Condition
from stages.errors import StorageError, UserError
from stages.generate.config import GenerateConfig
from stages.generate.driver import Driver
from stages.generate.events import Event, Failed
from stages.generate.in_process import InProcessFleet
from stages.generate.teacher import Teacher
from stages.records.commits import committed_units, read_commits
from stages.records.dataset import Dataset
from stages.records.plans import read_info, snapshots
from stages.records.teacher import TeacherFacts
from stages.records.verification import verify
from stages.storage.disk import DiskFolder
from stages.storage.folder import open_folder
from tests.conftest import fill, generate, generate_config
from tests.support.faults_table import survived
from tests.support.faulty_s3 import Fault, FaultyS3

pytestmark = pytest.mark.usefixtures("layout_found_once")


def records(root: Path | str) -> dict[str, dict[str, torch.Tensor]]:
    """Return every tensor of a dataset by key."""
    dataset = Dataset(root)
    found = {}
    for row in dataset.manifest.to_pylist():
        with dataset.open(row["shard"]) as file:
            found[row["key"]] = dataset.read(file, row)
    return found


def assert_same_records(one: Path | str, other: Path | str) -> None:
    left, right = records(one), records(other)
    assert left.keys() == right.keys()
    for key, tensors in left.items():
        for name, value in tensors.items():
            assert torch.equal(value, right[key][name]), (key, name)


class Faulty(InProcessFleet):
    """Fails at a unit the given number of times, and can stop the whole run after a number of units."""

    def __init__(self, config: GenerateConfig, faults: dict[int, int], die_after: int | None = None) -> None:
        super().__init__(config)
        self.faults, self.die_after = dict(faults), die_after

    def poll(self, timeout: float) -> list[Event]:
        if self.unit is not None:
            if self.faults.get(self.unit.index, 0):
                self.faults[self.unit.index] -= 1
                failed, self.unit = self.unit, None
                return [Failed(failed.index, RuntimeError("injected"))]
            if self.die_after == 0:
                raise KeyboardInterrupt
            self.die_after = None if self.die_after is None else self.die_after - 1
        return super().poll(timeout)


def test_an_interrupted_run_continues_to_the_same_dataset(
    shared_dataset: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=2))
    made = committed_units(open_folder(tmp_path))
    assert len(made) == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    with pytest.raises(UserError, match="unfinished, 2 of 4 units"):
        Dataset(tmp_path)
    again = Driver(config)
    assert sorted([*made, *again.todo]) == [0, 1, 2, 3]
    again.run(InProcessFleet(config))
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert_same_records(tmp_path, shared_dataset)
    assert verify(tmp_path)["ok"]


def test_a_finished_dataset_is_left_unchanged(damaged: Path, tiny_teacher: Path) -> None:
    driver = Driver(generate_config(tiny_teacher, damaged))
    assert driver.finished
    assert not driver.todo


def test_a_unit_that_fails_sometimes_is_retried(tiny_teacher: Path, tmp_path: Path, shared_dataset: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    summary = Driver(config).run(Faulty(config, {1: 2}))
    assert (summary["units_committed"], summary["units_quarantined"]) == (4, 0)
    assert_same_records(tmp_path, shared_dataset)


def test_a_unit_that_always_fails_is_quarantined_and_the_rest_are_made(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(UserError, match=r"1 of 4 units are missing after 3 attempts each; unit 1: .*injected"):
        Driver(config).run(Faulty(config, {1: 99}))
    info = json.loads((tmp_path / "generation.json").read_text())
    assert (info["units_planned"], info["units_committed"], info["units_quarantined"]) == (4, 3, 1)
    with pytest.raises(UserError, match="unfinished"):
        Dataset(tmp_path)
    Driver(config).run(InProcessFleet(config))
    assert verify(tmp_path)["ok"]


def test_a_teacher_that_never_works_ends_the_run(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(UserError, match="no unit could be made in 3 attempts"):
        Driver(config).run(Faulty(config, dict.fromkeys(range(4), 99)))


def test_preemption_does_not_count_as_an_attempt(tiny_teacher: Path, tmp_path: Path) -> None:
    class Preempted(InProcessFleet):
        left = 10

        def poll(self, timeout: float) -> list[Event]:
            if self.unit is not None and self.left:
                self.left -= 1
                unit, self.unit = self.unit, None
                return [Failed(unit.index, RuntimeError("node gone"), preempted=True)]
            return super().poll(timeout)

    config = generate_config(tiny_teacher, tmp_path)
    assert Driver(config).run(Preempted(config))["units_committed"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed=0, not 1"),
        ({"guidance_scale": [1.0, 5.0]}, r"guidance_scale=\[1.0, 6.0\], not \[1.0, 5.0\]"),
        ({"num_trajectories": 11}, "num_trajectories=12, not 11"),
        ({"storage_dtype": "float32"}, "storage_dtype=float16, not float32"),
        ({"trajectory": "diffusion"}, "trajectory=guided, not diffusion"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_and_unchanged(
    shared_dataset: Path, tiny_teacher: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Driver(generate_config(tiny_teacher, shared_dataset, **changes))
    assert verify(shared_dataset)["ok"]
    survived("another configuration over a dataset: refused", "driver")


def test_diffusion_trajectories_make_a_whole_dataset_that_records_their_kind(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    config = generate_config(tiny_teacher, tmp_path / "one", trajectory="diffusion")
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=2))
    Driver(config).run(InProcessFleet(config))
    assert verify(tmp_path / "one")["ok"]
    assert Dataset(tmp_path / "one").plan.config["trajectory"] == "diffusion"
    assert_same_records(
        tmp_path / "one", generate(generate_config(tiny_teacher, tmp_path / "other", trajectory="diffusion"))
    )


def test_commits_without_a_description_are_refused(damaged: Path, tiny_teacher: Path) -> None:
    (damaged / "dataset.json").unlink()
    with pytest.raises(UserError, match="commits but no dataset.json"):
        Driver(generate_config(tiny_teacher, damaged))


def test_a_worker_that_never_loads_ends_a_resumed_run_too(tiny_teacher: Path, tmp_path: Path) -> None:
    class NeverLoads(InProcessFleet):
        def poll(self, timeout: float) -> list[Event]:
            return [Failed(None, RuntimeError("no driver\nand more lines"))]

    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    with pytest.raises(UserError, match="could load the teacher in 3 attempts: RuntimeError: no driver$"):
        Driver(config).run(NeverLoads(config))


def test_a_moved_commit_is_made_again_in_a_finished_dataset(
    damaged: Path, tiny_teacher: Path, shared_dataset: Path
) -> None:
    (damaged / "commits" / "00002.json").unlink()
    driver = Driver(generate_config(tiny_teacher, damaged))
    assert list(driver.todo) == [2]
    driver.run(InProcessFleet(driver.config))
    assert verify(damaged)["ok"]
    assert_same_records(damaged, shared_dataset)


@pytest.mark.parametrize("unit", [1, 4])
def test_a_commit_removed_during_a_run_is_reported_and_made_again(damaged: Path, tiny_teacher: Path, unit: int) -> None:
    """A repair at the same time removes it."""
    config = generate_config(tiny_teacher, damaged, num_trajectories=15)

    class Taken(InProcessFleet):
        def poll(self, timeout: float) -> list[Event]:
            events = super().poll(timeout)
            (damaged / "commits" / f"{unit:05d}.json").unlink(missing_ok=True)
            return events

    with pytest.raises(UserError, match=f"commits/0000{unit}.json: gone: generate again"):
        Driver(config).run(Taken(config))
    Driver(config).run(InProcessFleet(config))
    assert verify(damaged)["ok"]


def test_a_folder_without_units_accepts_another_configuration(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(UserError, match="no unit could be made"):
        Driver(config).run(Faulty(config, dict.fromkeys(range(4), 99)))
    assert (tmp_path / "dataset.json").exists()
    assert generate(generate_config(tiny_teacher, tmp_path, seed=5)) == tmp_path


def test_options_that_do_not_affect_the_records_may_change(shared_dataset: Path, tiny_teacher: Path) -> None:
    assert Driver(generate_config(tiny_teacher, shared_dataset, num_workers=7, batch_size=2)).finished


def test_another_teacher_under_the_same_name_is_refused(
    tiny_teacher: Path, other_teacher: Path, tmp_path: Path
) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    with pytest.raises(UserError, match="begun with another teacher: its denoiser_fingerprint"):
        Driver(config).run(InProcessFleet(generate_config(other_teacher, tmp_path)))
    assert len(committed_units(open_folder(tmp_path))) == 1
    survived("another teacher of the same name: refused", "driver")


def test_a_full_disk_stops_the_run_and_loses_nothing(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written.*the same command goes on"):
            Driver(config).run(InProcessFleet(config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(committed_units(open_folder(tmp_path))) == 1
    assert len(list((tmp_path / "shards").iterdir())) == 1
    Driver(config).run(InProcessFleet(config))
    assert verify(tmp_path)["ok"]
    survived("files larger than the system allows", "storage")


@pytest.mark.parametrize("during", ["shard", "commit"])
def test_a_full_disk_stops_the_run_and_the_same_command_continues(
    tiny_teacher: Path, small_disk: Path, during: str
) -> None:
    config = generate_config(tiny_teacher, small_disk)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    (shard,) = (small_disk / "shards").iterdir()
    ballast = fill(small_disk, room=4096 if during == "shard" else shard.stat().st_blocks * 512)
    with pytest.raises(StorageError, match="No space left on device.*the same command goes on"):
        Driver(config).run(InProcessFleet(config))
    assert len(committed_units(open_folder(small_disk))) == 1
    assert len(list((small_disk / "shards").iterdir())) == (1 if during == "shard" else 2)
    ballast.unlink()
    Driver(config).run(InProcessFleet(config))
    assert verify(small_disk)["ok"]
    survived(f"a full disk in the middle of a {during}", "storage")


def test_a_teacher_that_predicts_nan_is_named(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    fleet = InProcessFleet(config)
    load = fleet.worker.load

    def broken(examples: Sequence[Condition]) -> dict[str, Any]:
        facts = load(examples)
        with torch.no_grad():
            fleet.worker.teacher.pipe.transformer.proj_out_2.bias.fill_(float("nan"))
        return facts

    fleet.worker.load = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"trajectory \d+, step 1: the teacher's latent is not finite"):
        Driver(config).run(fleet)
    assert generate(config) == tmp_path
    survived("a teacher that gives NaN: refused", "worker")


def test_a_dataset_grows_and_keeps_its_records(damaged: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    old = Dataset(damaged)
    times = {path: path.stat().st_mtime_ns for path in damaged.glob("[sc]*s/*")}
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    driver = Driver(config)
    assert not driver.finished
    assert sorted(driver.todo) == [4, 5, 6]
    summary = driver.run(InProcessFleet(config))
    assert (summary["trajectories"], summary["units_planned"], summary["units_committed"]) == (20, 7, 7)
    assert Driver(config).finished
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(list((damaged / "shards").iterdir())) == 7
    assert_same_records(damaged, generate(generate_config(tiny_teacher, tmp_path / "at_once", num_trajectories=20)))
    new, again = Dataset(damaged), Dataset(damaged, snapshot=old.fingerprint)
    assert (new.newest, again.newest, len(new.manifest)) == (True, False, 20)
    assert again.manifest.equals(old.manifest)
    assert again.plan.counts == old.plan.counts
    assert new.manifest.slice(0, 12).equals(old.manifest)
    assert [plan.trajectories for plan in new.info.plans] == [12, 8]
    assert snapshots(open_folder(damaged)) == [old.fingerprint, new.fingerprint]
    assert verify(damaged)["trajectories"] == 20
    assert verify(damaged)["ok"]


def test_a_unit_that_was_not_full_stays_unchanged(tiny_teacher: Path, tmp_path: Path) -> None:
    for count in (4, 5, 9):
        config = generate_config(tiny_teacher, tmp_path / "grown", num_trajectories=count)
        Driver(config).run(InProcessFleet(config))
    commits = read_commits(open_folder(tmp_path / "grown"))
    units = [[row["trajectory"] for row in commit.samples] for commit in commits]
    assert units == [[0, 1, 2], [3], [4], [5, 6, 7], [8]]
    assert verify(tmp_path / "grown")["ok"]


def test_a_growing_dataset_stays_readable_and_its_growth_continues(damaged: Path, tiny_teacher: Path) -> None:
    old = Dataset(damaged)
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=2))
    assert len(committed_units(open_folder(damaged))) == 6
    assert Dataset(damaged).fingerprint == old.fingerprint
    assert Dataset(damaged).plan.config["num_trajectories"] == 12
    found = verify(damaged)
    assert (found["ok"], found["trajectories"], found["shards"]) == (True, 12, 4)
    for count in (12, 19, 25):
        with pytest.raises(UserError, match=f"num_trajectories=20, not {count}"):
            Driver(generate_config(tiny_teacher, damaged, num_trajectories=count))
    again = Driver(config)
    assert len(again.todo) == 1
    again.run(InProcessFleet(config))
    assert len(Dataset(damaged).manifest) == 20


def test_a_killed_publication_is_completed_later(
    damaged: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the three files: the snapshot's manifest, the newest manifest, dataset.json."""
    old = Dataset(damaged)
    config = generate_config(tiny_teacher, damaged, num_trajectories=16)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    write = DiskFolder.write
    for name in ("manifests/2.parquet", "manifest.parquet", "dataset.json"):

        def killed(folder: DiskFolder, written: str, content: bytes, name: str = name) -> None:
            if written == name:
                raise KeyboardInterrupt
            write(folder, written, content)

        monkeypatch.setattr(DiskFolder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            Driver(config).run(InProcessFleet(config))
        monkeypatch.setattr(DiskFolder, "write", write)
        assert Dataset(damaged).fingerprint == old.fingerprint
        assert verify(damaged)["ok"]
        assert not Driver(config).todo
        assert not Driver(config).finished
        survived("killed while it publishes", "driver")
    Driver(config).run(InProcessFleet(config))
    assert len(Dataset(damaged).manifest) == 16
    assert Driver(config).finished


def test_growth_that_never_began_is_forgotten(damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=0))
    assert Driver(generate_config(tiny_teacher, damaged)).finished
    other = generate_config(tiny_teacher, damaged, num_trajectories=15)
    Driver(other).run(InProcessFleet(other))
    assert len(Dataset(damaged).manifest) == 15
    assert verify(damaged)["ok"]


def test_more_classes_follow_the_existing_ones(tiny_teacher: Path, tmp_path: Path) -> None:
    def config(classes: Any, each: int) -> GenerateConfig:
        options = {"num_trajectories": None, "num_trajectories_per_condition": each, "class_labels": classes}
        return generate_config(tiny_teacher, tmp_path / "data", **options)

    (tmp_path / "classes.txt").write_text("7\n3\n")
    generate(config(str(tmp_path / "classes.txt"), 2))
    old = Dataset(tmp_path / "data")
    (tmp_path / "classes.txt").write_text("7\n3\n5\n")
    generate(config(str(tmp_path / "classes.txt"), 2))
    generate(config([7, 3, 5, 9], 3))
    new = Dataset(tmp_path / "data")
    assert new.manifest["class_label"].to_pylist() == [7, 3, 7, 3, 5, 5, 9, 9, 7, 3, 5, 9]
    assert new.plan.conditions.class_labels == [3, 5, 7, 9]
    assert Dataset(tmp_path / "data", snapshot=old.fingerprint).plan.conditions.class_labels == [3, 7]
    assert verify(tmp_path / "data")["ok"]
    refused = [
        (config([7, 3, 9, 5], 3), r"class_labels=\[7, 3, 5, 9\], not \[7, 3, 9, 5\]"),
        (config([7, 3, 5], 3), r"class_labels=\[7, 3, 5, 9\], not \[7, 3, 5\]"),
        (config([7, 3, 5, 9, 1], 2), "num_trajectories_per_condition=3, not 2"),
        (replace(config([7, 3, 5, 9, 1], 3), seed=1), "seed=0, not 1"),
    ]
    for asked, message in refused:
        with pytest.raises(UserError, match=f"holds a dataset of another configuration: {message}"):
            Driver(asked)


def test_a_changed_file_of_classes_is_noticed(tiny_teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("7\n3\n")
    config = generate_config(tiny_teacher, tmp_path / "data", class_labels=str(path), num_trajectories=6)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    for content in ("3\n7\n", "7\n3\n5\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=f"of other class_labels: class_labels={path} no longer names the 2 that"):
            Driver(config)
    (tmp_path / "same.txt").write_text("7 3")
    generate(replace(config, class_labels=str(tmp_path / "same.txt")))
    path.write_text("3\n7\n5\n")
    with pytest.raises(UserError, match=f"class_labels={path} no longer names first the 2 that it was made of"):
        Driver(replace(config, num_trajectories=9))
    (tmp_path / "same.txt").write_text("3 7 5")
    with pytest.raises(UserError, match=f"class_labels={path}, not {tmp_path}/same.txt"):
        Driver(replace(config, class_labels=str(tmp_path / "same.txt"), num_trajectories=9))


def test_a_moved_commit_is_made_again_in_every_snapshot(
    damaged: Path, tiny_teacher: Path, shared_dataset: Path
) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=14)
    Driver(config).run(InProcessFleet(config))
    commit = json.loads((damaged / "commits" / "00001.json").read_bytes())
    (damaged / "commits" / "00001.json").unlink()
    (damaged / commit["shard"]).unlink()
    driver = Driver(config)
    assert list(driver.todo) == [1]
    driver.run(InProcessFleet(config))
    assert verify(damaged)["ok"]
    first, second = snapshots(open_folder(damaged))
    assert Dataset(damaged).fingerprint == second
    known = records(shared_dataset)
    dataset = Dataset(damaged, snapshot=first)
    for row in dataset.manifest.to_pylist():
        with dataset.open(row["shard"]) as file:
            assert torch.equal(dataset.read(file, row)["latent"], known[row["key"]]["latent"])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("seed", 2**63),
        ("class_label", 2**70),
        ("prompt", "half of a pair \ud83d"),
        ("prompt", 3),
        ("class_label", "three"),
    ],
)
def test_values_that_the_manifest_cannot_hold_are_refused_before_the_teacher_is_loaded(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, value: Any
) -> None:
    conditions = [{"prompt": "a cat", "class_label": 3, "seed": 2**63 - 1}, {column: value}]
    monkeypatch.setattr("stages.generate.plan.read_conditions", lambda _: conditions)
    config = generate_config(tiny_teacher, tmp_path, prompts="p.jsonl")
    with pytest.raises(UserError, match=rf"^p\.jsonl: row 2: {column}={re.escape(repr(value))}: cannot be recorded: "):
        Driver(config)


def test_a_dataset_on_the_hub_is_not_generated_into(tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, Path("unused"))
    config.output_dir = "hf://datasets/someone/tiny"
    with pytest.raises(UserError, match=r"output_dir=hf://datasets/someone/tiny: .* only read: .*pipeline.publish"):
        generate(config)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_teacher_is_loaded(
    tiny_teacher: Path, tmp_path: Path, s3: FaultyS3
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(StorageError, match=rf"^{output}: cannot be made: "):
            Driver(generate_config(tiny_teacher, output))
    s3.faults = [Fault("PUT", "bucket/data", 403, times=99)]
    with pytest.raises(StorageError, match=r"^s3://bucket/data/\.probe: cannot be written: "):
        Driver(generate_config(tiny_teacher, "s3://bucket/data"))
    s3.faults = [Fault("DELETE", "bucket/data", 403, times=99)]
    Driver(generate_config(tiny_teacher, "s3://bucket/data"))


def test_a_disk_that_is_too_small_is_warned_about_after_the_first_unit(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    monkeypatch.setattr(DiskFolder, "free", lambda _: 10_000)
    with pytest.warns(UserWarning, match=r"about 0\.\d MB are still to be made, and 0\.0 MB are free there") as caught:
        Driver(config).run(InProcessFleet(config))
    assert len([warning for warning in caught if "still to be made" in str(warning.message)]) == 1


def test_a_teacher_whose_facts_hold_tuples_and_arrays_is_recognized(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path)
    for attempt in range(2):
        fleet = Faulty(config, {}, die_after=2 if attempt == 0 else None)
        facts = Teacher.facts

        def facts(self: Teacher, facts: Any = facts) -> TeacherFacts:
            return replace(facts(self), scheduler_config={"betas": np.linspace(0, 1, 3), "range": (0.5, 1.15)})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "facts", facts)
            if attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    Driver(config).run(fleet)
            else:
                Driver(config).run(fleet)
    info = read_info(open_folder(tmp_path))
    assert info is not None
    assert info.complete
    assert info.teacher.scheduler_config == {"betas": [0, 0.5, 1], "range": [0.5, 1.15]}
