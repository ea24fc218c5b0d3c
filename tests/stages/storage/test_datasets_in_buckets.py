"""Datasets in a bucket, from generation to training: they equal those on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pipeline.generate
import pipeline.verify
from pipeline.verify import VerifyConfig
from stages.errors import DamageError, StorageError, UserError
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.records.commits import commit_unit, committed_units, read_commits
from stages.records.dataset import Dataset
from stages.records.shard import encode
from stages.records.verification import verify
from stages.storage.cache import ShardCache
from stages.storage.folder import open_folder
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, train_config
from tests.stages.generate.test_driver import Faulty, assert_same_records
from tests.stages.records.test_trajectory import trajectory
from tests.support.damages import DAMAGES
from tests.support.faults_table import survived
from tests.support.faulty_s3 import Fault, FaultyS3
from tests.support.made_up import PLAN

pytestmark = pytest.mark.usefixtures("layout_found_once")
ADDRESS = "s3://bucket/data/tiny"


@pytest.fixture
def uploaded(s3: FaultyS3, shared_dataset: Path) -> str:
    """The shared dataset in a bucket."""
    for path in shared_dataset.rglob("*.*"):
        s3.put(f"data/tiny/{path.relative_to(shared_dataset)}", path.read_bytes())
    s3.requests.clear()
    return ADDRESS


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_dataset_in_a_bucket_equals_the_one_on_disk(
    s3: FaultyS3, tiny_teacher: Path, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("stages.generate.fleet.RayFleet", InProcessFleet)  # Ray's workers would not see the environment
    config = generate_config(tiny_teacher, ADDRESS, preview=4)
    pipeline.generate.main(config)
    assert f"{ADDRESS}: 12 trajectories, 48 records, 4 shards" in capsys.readouterr().out
    names = [name.removeprefix("data/tiny/") for name in s3.names()]
    assert {name for name in names if "/" not in name} == {
        "config.yaml",
        "dataset.json",
        "generation.json",
        "manifest.parquet",
        "preview.png",
    }
    for folder, count in (("shards", 4), ("commits", 4), ("manifests", 1), ("preview", 4)):
        assert sum(name.startswith(f"{folder}/") for name in names) == count
    assert json.loads(s3.get("data/tiny/generation.json"))["units_committed"] == 4
    assert_same_records(ADDRESS, shared_dataset)
    pipeline.verify.main(VerifyConfig(ADDRESS))
    assert "whole: nothing is missing or damaged" in capsys.readouterr().out
    assert json.loads(s3.get("data/tiny/verification.json"))["ok"]
    pipeline.generate.main(config)
    assert "already finished, 4 units; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{ADDRESS}: holds a dataset of another configuration: seed=0, not 1"):
        Driver(replace(config, seed=1))
    assert not Path("s3:").exists()


def test_an_interrupted_run_goes_on_in_the_bucket(s3: FaultyS3, tiny_teacher: Path, shared_dataset: Path) -> None:
    config = generate_config(tiny_teacher, ADDRESS)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=2))
    with pytest.raises(UserError, match=f"{ADDRESS}: unfinished, 2 of 4 units"):
        Dataset(ADDRESS)
    shards = s3.names("data/tiny/shards/")
    again = Driver(config)
    assert len(again.todo) == 2
    again.run(InProcessFleet(config))
    assert set(shards) < set(s3.names("data/tiny/shards/"))
    assert_same_records(ADDRESS, shared_dataset)
    survived("interrupted over a bucket", "driver")


def test_of_two_attempts_at_a_unit_one_wins_and_the_other_takes_its_shard_away(s3: FaultyS3) -> None:
    root = open_folder(ADDRESS)
    first = commit_unit(root, 3, [encode(trajectory())], PLAN)
    assert commit_unit(root, 3, [encode(trajectory())], PLAN) == first
    assert s3.names("data/tiny/shards") == [f"data/tiny/{first.shard}"]
    assert list(read_commits(root)) == [first]


@pytest.mark.parametrize("status", [500, 503, 409, 412])
def test_a_commit_whose_answer_was_lost_is_its_own(s3: FaultyS3, status: int) -> None:
    s3.faults = [Fault("PUT", "commits", status, carried_out=True)]
    root = open_folder(ADDRESS)
    commit = commit_unit(root, 0, [encode(trajectory())], PLAN)
    assert s3.faults[0].times == 0
    assert s3.names("data/tiny/shards") == [f"data/tiny/{commit.shard}"]
    survived(f"a commit answered by {status} although it was made", "storage")


def test_an_upload_that_breaks_leaves_no_shard_and_no_commit(s3: FaultyS3) -> None:
    large = trajectory(100_000)  # several parts of an upload
    s3.faults = [Fault("PUT", r"shards.*partNumber=2", 403)]
    with pytest.raises(StorageError, match=rf"{ADDRESS}/shards/00000-.*\.tar: cannot be written"):
        commit_unit(open_folder(ADDRESS), 0, [encode(large)], PLAN)
    assert s3.faults[0].times == 0
    assert s3.names() == []
    assert list(s3.bucket.multipart_uploads.all()) == []
    assert commit_unit(open_folder(ADDRESS), 0, [encode(large)], PLAN).samples[0]["records"] == 100_000
    survived("an upload of a shard that breaks", "storage")


def test_trajectories_that_fail_leave_no_shard_and_no_commit(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("stages.records.commits.write_shard", fails)
    with pytest.raises(RuntimeError):
        commit_unit(open_folder(ADDRESS), 0, [encode(trajectory())], PLAN)
    assert s3.names() == []


def test_generation_goes_through_an_unsteady_service(s3: FaultyS3, tiny_teacher: Path, shared_dataset: Path) -> None:
    kinds = [("PUT", 500), ("GET", 503), ("PUT", None), ("HEAD", 500), ("GET", None)]
    s3.faults = [Fault(method, "bucket", status, times=2) for method, status in kinds]
    s3.faults += [Fault("PUT", "commits/00002", 409), Fault("PUT", "commits/00003", 500, carried_out=True)]
    config = generate_config(tiny_teacher, ADDRESS)
    assert Driver(config).run(InProcessFleet(config))["units_committed"] == 4
    assert verify(ADDRESS)["ok"]
    assert [fault.times for fault in s3.faults] == [0] * 7
    assert_same_records(ADDRESS, shared_dataset)
    survived("a service that is unsteady for a whole run", "storage")


def test_a_service_that_refuses_stops_the_run_and_keeps_its_units(s3: FaultyS3, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, ADDRESS)
    s3.faults = [Fault("PUT", "shards/00002", 403, times=4)]
    with pytest.raises(StorageError, match=f"{ADDRESS}/shards/00002-.*cannot be written: .*the same command goes on"):
        Driver(config).run(InProcessFleet(config))
    assert committed_units(open_folder(ADDRESS)) == [0, 1, 3]
    Driver(config).run(InProcessFleet(config))
    assert verify(ADDRESS)["ok"]
    survived("a service that refuses for a while", "storage")


def test_damage_in_a_bucket_is_named(s3: FaultyS3, uploaded: str, tmp_path: Path) -> None:
    missing, short, flipped, _ = s3.names("data/tiny/shards/")
    s3.bucket.Object(missing).delete()
    s3.put(short, s3.get(short)[:-512])
    content = bytearray(s3.get(flipped))
    content[700] ^= 1
    s3.put(flipped, bytes(content))
    problems = {f"data/tiny/{problem['shard']}": problem["found"] for problem in verify(uploaded)["problems"]}
    assert problems.keys() == {missing, short, flipped}
    assert problems[missing] == "no such file"
    with pytest.raises(UserError, match=f"s3://bucket/{missing}: damaged: expected .* bytes, found no such file"):
        Trainer(train_config(uploaded, tmp_path / "run"))


@pytest.mark.parametrize("cached", [False, True])
def test_damage_in_a_bucket_is_skipped_by_choice(s3: FaultyS3, uploaded: str, tmp_path: Path, cached: bool) -> None:
    rows = Dataset(uploaded).manifest.to_pylist()
    s3.bucket.Object(f"data/tiny/{rows[0]['shard']}").delete()
    last = f"data/tiny/{rows[-1]['shard']}"
    s3.put(last, s3.get(last)[: rows[-1]["offset"] + 100])
    changes = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    summary = Trainer(train_config(uploaded, tmp_path / "run", on_damage="skip", **changes)).run()
    lost = {f"{row['shard']} {row['key']}" for row in (*rows[:3], rows[-1])}
    assert set(summary["samples_skipped"]) <= lost
    assert summary["records_skipped"] == 4 * len(summary["samples_skipped"]) >= 4


def test_a_copy_that_was_damaged_is_named(uploaded: str, tmp_path: Path) -> None:
    dataset = Dataset(uploaded, cache=ShardCache(tmp_path / "cache", 1 << 30))
    row = dataset.manifest.to_pylist()[0]
    with dataset.open(row["shard"]) as file:
        dataset.read(file, row)
    copy = tmp_path / "cache" / row["shard_sha256"]
    content = bytearray(copy.read_bytes())
    content[row["offset"] + 200] ^= 1
    copy.write_bytes(content)
    with dataset.open(row["shard"]) as file, pytest.raises(DamageError, match=f"damaged: remove {copy.name}$"):
        dataset.read(file, row)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_from_a_bucket_ends_with_the_same_weights(
    s3: FaultyS3, uploaded: str, tiny_adapter: Path, tmp_path: Path, cached: bool
) -> None:
    changes = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    Trainer(train_config(uploaded, tmp_path / "run", **changes)).run()
    assert_same_weights(tmp_path / "run", tiny_adapter)
    if cached:
        assert s3.count("GET", "shards/") == 4
        sums = {hashlib.sha256(s3.get(name)).hexdigest() for name in s3.names("data/tiny/shards/")}
        assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", *sums}
        s3.requests.clear()
        Trainer(train_config(uploaded, tmp_path / "again", **changes)).run()
        assert (s3.count("GET", "shards/"), s3.count("GET", "manifest")) == (0, 1)
        assert_same_weights(tmp_path / "again", tiny_adapter)


def test_a_cache_smaller_than_the_dataset_keeps_its_bound(
    s3: FaultyS3, uploaded: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    largest = max(entry.size for entry in s3.bucket.objects.filter(Prefix="data/tiny/shards/"))
    changes = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 2 * largest}
    Trainer(train_config(uploaded, tmp_path / "run", **changes)).run()
    assert_same_weights(tmp_path / "run", tiny_adapter)
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 2 * largest


def test_a_run_from_a_bucket_is_resumed_exactly(
    s3: FaultyS3, uploaded: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    """A run that began with the dataset on disk continues with its copy in the bucket."""
    shutil.copytree(tiny_adapter / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-00000012.pt").unlink()
    s3.faults = [Fault("GET", "shards/", 503, times=2), Fault("HEAD", "shards/", None)]
    trainer = Trainer(train_config(uploaded, tmp_path, resume_from_checkpoint="latest"))
    assert trainer.step == 8
    trainer.run()
    assert [fault.times for fault in s3.faults] == [0, 0]
    assert_same_weights(tmp_path, tiny_adapter)
    survived("503 and no answer to training", "storage")


def test_a_service_that_refuses_is_no_damage_to_be_skipped(s3: FaultyS3, uploaded: str, tmp_path: Path) -> None:
    trainer = Trainer(train_config(uploaded, tmp_path, on_damage="skip"))
    s3.faults = [Fault("GET", "shards/", 403, times=99)]
    with pytest.raises(StorageError, match=f"{uploaded}/shards/.*cannot be read"):
        trainer.run()
    survived("a service that refuses training: told in one line", "storage")


def test_a_run_has_its_own_folder_on_disk(uploaded: str, tmp_path: Path) -> None:
    refused: list[tuple[Path, dict[str, str], str]] = [
        (tmp_path, {"cache_dir": "s3://bucket/cache"}, "cache_dir=s3://bucket/cache: name a local folder"),
        (tmp_path, {"output_dir": "s3://bucket/run"}, "output_dir=s3://bucket/run: name a local folder"),
    ]
    for output, changes, message in refused:
        with pytest.raises(UserError, match=message):
            Trainer(replace(train_config(uploaded, output), **changes))


def test_a_folder_that_holds_nothing_is_named(s3: FaultyS3, tmp_path: Path) -> None:
    for done in (lambda: Dataset(ADDRESS), lambda: Trainer(train_config(ADDRESS, tmp_path)), lambda: verify(ADDRESS)):
        with pytest.raises(UserError, match=f"{ADDRESS}: holds no dataset"):
            done()


def test_a_dataset_in_a_bucket_grows_and_its_snapshots_stay(uploaded: str, tiny_teacher: Path, tmp_path: Path) -> None:
    old = Dataset(uploaded)
    config = generate_config(tiny_teacher, uploaded, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    assert Dataset(uploaded).fingerprint == old.fingerprint
    assert verify(uploaded)["trajectories"] == 12
    Driver(config).run(InProcessFleet(config))
    assert_same_records(uploaded, generate(generate_config(tiny_teacher, tmp_path, num_trajectories=20)))
    assert Dataset(uploaded, snapshot=old.fingerprint).manifest.equals(old.manifest)
    assert verify(uploaded)["trajectories"] == 20
    assert verify(uploaded)["ok"]


def upload(s3: FaultyS3, root: Path) -> str:
    for path in root.rglob("*.*"):
        s3.put(f"data/tiny/{path.relative_to(root)}", path.read_bytes())
    return ADDRESS


REPAIRED = [
    "a shard cut in a payload",
    "a flipped bit in a payload",
    "a missing shard",
    "two shards swapped",
    "an extra shard",
    "a flipped bit in a commit record",
    "a manifest of other rows",
]


@pytest.mark.parametrize("name", REPAIRED)
def test_damage_in_a_bucket_is_repaired_and_made_again(
    s3: FaultyS3, damaged: Path, shared_dataset: Path, tiny_teacher: Path, name: str
) -> None:
    named = DAMAGES[name](damaged)
    upload(s3, damaged)
    assert sorted(problem["shard"] for problem in verify(ADDRESS)["problems"]) == sorted(named)
    with suppress(UserError):
        pipeline.verify.main(VerifyConfig(ADDRESS, repair=True, grace=0))
    info = json.loads(s3.get("data/tiny/verification.json"))
    if not info["ok"]:
        with pytest.raises(UserError, match="unfinished"):
            Dataset(ADDRESS)
    for line in info["repaired"]:
        if line["done"].startswith("moved to "):
            to = line["done"].removeprefix("moved to ")
            assert s3.get(f"data/tiny/{to}") == (damaged / line["shard"]).read_bytes()
    config = generate_config(tiny_teacher, ADDRESS)
    if not Driver(config).finished:
        Driver(config).run(InProcessFleet(config))
    found = verify(ADDRESS)
    assert (found["ok"], found["orphans"]["count"]) == (True, 0)
    assert_same_records(ADDRESS, shared_dataset)
    assert Dataset(ADDRESS).fingerprint == Dataset(shared_dataset).fingerprint
    assert ".now" not in " ".join(s3.names())
    survived(f"{name}, in a bucket", "dataset")


def test_orphans_in_a_bucket_go_when_they_are_old(s3: FaultyS3, uploaded: str) -> None:
    s3.put("data/tiny/shards/00001-0badcafe.tar", b"orphan")
    s3.put("data/tiny/shards/00002-0badcafe.tar", b"orphan")
    s3.bucket.Object(s3.names("data/tiny/commits/00002")[0]).delete()
    way_out = f"without 00002: .* --config config.yaml output_dir={ADDRESS}`, with a copy of {ADDRESS}/config.yaml,"
    with pytest.raises(UserError, match=way_out):
        pipeline.verify.main(VerifyConfig(uploaded, repair=True))
    assert len(s3.names("data/tiny/shards")) == 6
    with pytest.raises(UserError, match=way_out):
        pipeline.verify.main(VerifyConfig(uploaded, repair=True, grace=0))
    assert [name[17:22] for name in s3.names("data/tiny/shards")] == ["00000", "00001", "00002", "00002", "00003"]
