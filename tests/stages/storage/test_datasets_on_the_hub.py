"""Datasets on a hub, verified and trained on: they equal those on disk."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

import pipeline.train
import pipeline.verify
from pipeline.train import TrainConfig
from pipeline.verify import VerifyConfig
from stages.errors import DamageError, StorageError, UsageError, UserError
from stages.records.dataset import Dataset
from stages.records.verification import verify
from stages.storage.folder import open_folder
from stages.train.trainer import Trainer
from tests.conftest import fill, generate, generate_config, train_config
from tests.stages.storage.test_datasets_in_buckets import assert_same_weights
from tests.support.faults_table import survived
from tests.support.faulty_s3 import Fault
from tests.support.hub import READER, STRANGER, Hub

ADDRESS, REPO = "hf://datasets/someone/tiny", "datasets/someone/tiny"


def content_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def published(hub: Hub, shared_dataset: Path) -> Hub:
    """A hub with the shared dataset."""
    hub.add(REPO, content_of(shared_dataset))
    return hub


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_from_the_hub_ends_with_the_same_weights(
    published: Hub, tiny_adapter: Path, tmp_path: Path, cached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    pipeline.train.main(train_config(ADDRESS, tmp_path / "run", **changes))
    assert_same_weights(tmp_path / "run", tiny_adapter)
    assert f"data_dir: {ADDRESS}@{published.repos[REPO].branches['main']}\n" in capsys.readouterr().out
    if cached:
        shards = [content for name, content in published.repos[REPO].files.items() if name.endswith(".tar")]
        assert published.count("GET", "/large/") == len(shards) + 1  # and the manifest
        sums = {hashlib.sha256(content).hexdigest() for content in shards}
        assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", *sums}


def test_a_run_stays_with_the_commit_that_it_began_with(
    published: Hub, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run = published.repos[REPO], Trainer.run
    before = repo.branches["main"]

    def run_after_a_push(trainer: Trainer) -> object:
        repo.commit({"README.md": b"all else is gone"}, "removed")
        return run(trainer)

    monkeypatch.setattr(Trainer, "run", run_after_a_push)
    pipeline.train.main(train_config(ADDRESS, tmp_path / "run"))
    assert_same_weights(tmp_path / "run", tiny_adapter)
    with pytest.raises(UserError, match=f"{ADDRESS}@{repo.branches['main']}: holds no dataset"):
        Dataset(ADDRESS)
    assert Dataset(f"{ADDRESS}@{before}").newest


def test_a_run_that_is_resumed_keeps_its_snapshot(
    published: Hub, tiny_teacher: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """It began with the dataset on disk, and goes on with the grown dataset on the hub."""
    grown = generate(generate_config(tiny_teacher, tmp_path / "grown"))
    generate(generate_config(tiny_teacher, grown, num_trajectories=20))
    published.repos[REPO].commit(content_of(grown), "grown")
    shutil.copytree(tiny_adapter / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "step-00000012.pt").unlink()
    published.faults = [Fault("GET", "/large/", 503), Fault("GET", r"resolve/.*\.tar", None)]
    trainer = Trainer(train_config(ADDRESS, tmp_path / "run", resume_from_checkpoint="latest"))
    assert (trainer.step, trainer.dataset.newest) == (8, False)
    trainer.run()
    assert [fault.times for fault in published.faults] == [0, 0]
    assert_same_weights(tmp_path / "run", tiny_adapter)
    survived("503 and no answer of a hub to training", "storage")


def test_a_resumed_run_names_the_commit_that_it_began_with(published: Hub, tiny_teacher: Path, tmp_path: Path) -> None:
    repo = published.repos[REPO]
    before = repo.branches["main"]
    Trainer(train_config(ADDRESS, tmp_path / "run", max_train_steps=4)).run()
    repo.commit(content_of(generate(generate_config(tiny_teacher, tmp_path / "other", seed=1))), "another")
    config = train_config(ADDRESS, tmp_path / "run", resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=f"not the dataset of the checkpoint.*set data_dir to {ADDRESS}@{before}, or"):
        Trainer(config)
    config.data_dir = f"{ADDRESS}@{before}"
    assert Trainer(config).step == 4


def test_verify_reads_each_shard_of_a_commit(
    published: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipeline.verify.main(VerifyConfig(ADDRESS, output=str(tmp_path / "report.json")))
    assert "whole: nothing is missing or damaged" in capsys.readouterr().out
    with pytest.warns(
        UserWarning, match="a dataset on the hub is only read: say output=FILE to have the report elsewh"
    ):
        pipeline.verify.main(VerifyConfig(ADDRESS))
    repo = published.repos[REPO]
    missing, short, flipped, _ = sorted(name for name in repo.files if name.endswith(".tar"))
    content = bytearray(repo.files[flipped])
    content[700] ^= 1
    files = repo.files | {flipped: bytes(content), short: repo.files[short][:-512]}
    del files[missing]
    repo.commit(files, "damaged", "other")
    problems = {problem["shard"]: problem["found"] for problem in verify(f"{ADDRESS}@other")["problems"]}
    assert problems.keys() == {missing, short, flipped}
    assert problems[missing] == "no such file"
    with pytest.raises(DamageError, match=f"{missing}: damaged: expected .* bytes, found no such file"):
        Dataset(f"{ADDRESS}@other")


@pytest.mark.parametrize(
    ("address", "token", "message"),
    [
        ("hf://someone/tiny", None, "not the address of a dataset on the hub: write hf://datasets/OWNER/NAME"),
        ("hf://datasets/tiny", None, "not the address of a dataset on the hub: write hf://datasets/OWNER/NAME"),
        ("hf://datasets/some one/tiny", None, "not a name of a repository: write OWNER/NAME"),
        ("hf://datasets/someone/nothing", None, "has no such repository, or it is private: .* or set HF_TOKEN"),
        ("hf://datasets/someone/private", None, "has no such repository, or it is private: .* or set HF_TOKEN"),
        ("hf://datasets/someone/private", STRANGER, "or it is private: check the name, and what HF_TOKEN may read"),
        (
            "hf://datasets/someone/gated",
            READER,
            "asks for an agreement: give it on the repository's page, and set HF_TO",
        ),
        ("hf://datasets/someone/tiny", "hf_wrong", "HF_TOKEN is not valid: make one at .*/settings/tokens"),
        (f"{ADDRESS}@nowhere", None, "no such revision: name a branch, a tag or a commit"),
        (f"{ADDRESS}@{'1' * 40}", None, "no such revision: name a branch, a tag or a commit"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    published: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, token: str | None, message: str
) -> None:
    published.add("datasets/someone/private", {}, private=True)
    published.add("datasets/someone/gated", {}).gated = True
    published.point_to(monkeypatch, token)
    with pytest.raises(UserError, match=message) as found:
        Trainer(TrainConfig(data_dir=address, output_dir=str(tmp_path / "run")))
    assert len(str(found.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_private_dataset_is_read_with_a_token(
    published: Hub, monkeypatch: pytest.MonkeyPatch, shared_dataset: Path
) -> None:
    published.repos[REPO].private = True
    published.point_to(monkeypatch, READER)
    assert verify(ADDRESS)["ok"]


def test_a_hub_that_does_not_answer_is_one_line(published: Hub, tmp_path: Path) -> None:
    trainer = Trainer(train_config(ADDRESS, tmp_path, on_damage="skip"))
    published.faults = [Fault("GET", "/large/", 403, times=99)]
    with pytest.raises(StorageError, match=rf"{ADDRESS}@\w+/shards/.*cannot be read: the token has no right to it"):
        trainer.run()
    survived("a hub that refuses training: one-line error", "storage")
    published.stop()
    with pytest.raises(StorageError, match="does not answer: .*: check the network and HF_ENDPOINT"):
        open_folder(ADDRESS)


def test_a_full_disk_at_download_is_one_line(published: Hub, tmp_path: Path, small_disk: Path) -> None:
    fill(small_disk, room=4096)
    with pytest.raises(StorageError, match=rf"^{small_disk}/cache: cannot be written: No space .*another cache_dir"):
        Trainer(train_config(ADDRESS, tmp_path / "run", cache_dir=str(small_disk / "cache"))).run()
    assert [path.name for path in (small_disk / "cache").iterdir()] == [".lock"]
    survived("a full disk at a download from a hub: one-line error", "storage")


def test_nothing_writes_on_the_hub(published: Hub, tiny_teacher: Path) -> None:
    root = open_folder(ADDRESS)
    for write in (
        lambda: root.write("x", b""),
        lambda: root.create("x", b""),
        lambda: root.delete("dataset.json"),
        lambda: root.move("dataset.json", "x"),
        lambda: root.probe(),
    ):
        with pytest.raises(StorageError, match="cannot be written: a dataset on the hub is only read"):
            write()
    with pytest.raises(StorageError, match="only read: leave repair=true out"):
        pipeline.verify.main(VerifyConfig(ADDRESS, repair=True))
    with pytest.raises(UsageError, match="a dataset on the hub is only read"):
        generate(generate_config(tiny_teacher, ADDRESS, num_trajectories=20))
    assert [method for method, _ in published.requests if method not in ("GET", "HEAD")] == []
