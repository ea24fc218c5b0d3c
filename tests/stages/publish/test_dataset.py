"""A dataset on its way to a hub: whole or not at all, and gone on with where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from stages.configuration.parsing import parse
from stages.errors import ChangedError, StorageError, UserError
from stages.generate.config import GenerateConfig
from stages.generate.driver import Driver
from stages.publish import dataset as publishing
from stages.publish import repository
from stages.publish.dataset import publish_dataset
from stages.publish.repository import Repository
from stages.records.dataset import Dataset
from stages.records.repair import repair
from stages.records.verification import Survey, survey, verify
from stages.storage.folder import Folder, open_folder
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, train_config
from tests.stages.generate.test_driver import Faulty
from tests.stages.storage.test_datasets_in_buckets import assert_same_weights
from tests.support.damages import DAMAGES
from tests.support.faults_table import survived
from tests.support.faulty_s3 import Fault
from tests.support.hub import READER, WRITER, Hub

ADDRESS, REPO = "hf://datasets/someone/tiny", "datasets/someone/tiny"


@pytest.fixture
def writable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that this process may write to."""
    hub.point_to(monkeypatch, WRITER)
    return hub


def shards_of(root: Path) -> list[Path]:
    return sorted((root / "shards").glob("*.tar"))


def test_a_published_dataset_trains_to_the_same_weights(
    writable: Hub, shared_dataset: Path, tiny_teacher: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    done = publish_dataset(shared_dataset, "someone/tiny")
    repo = writable.repos[REPO]
    assert done.address == f"{ADDRESS}@{repo.branches['main']}"
    assert (done.shards, done.sent, repo.messages[1:]) == (4, 4, ["4 shards", "12 trajectories"])
    for name in ("manifest.parquet", "manifests/1.parquet", "commits/00003.json"):
        assert repo.files[name] == (shared_dataset / name).read_bytes()
    assert verify(ADDRESS)["ok"]
    Trainer(train_config(ADDRESS, tmp_path / "run", pretrained_model_name_or_path=str(tiny_teacher))).run()
    assert_same_weights(tmp_path / "run", tiny_adapter)


def test_nobody_sees_a_dataset_before_its_last_commit(writable: Hub, shared_dataset: Path, tmp_path: Path) -> None:
    manifest = hashlib.sha256((shared_dataset / "manifest.parquet").read_bytes()).hexdigest()
    writable.faults = [Fault("PUT", f"/large/{manifest}", 403)]  # of the last commit
    with pytest.raises(StorageError, match="the token has no right to it"):
        publish_dataset(shared_dataset, "someone/tiny")
    assert sum(name.endswith(".tar") for name in writable.repos[REPO].files) == 4
    with pytest.raises(UserError, match="holds no dataset"):
        Dataset(ADDRESS)
    assert publish_dataset(shared_dataset, "someone/tiny").sent == 0
    assert Dataset(ADDRESS).newest


def test_an_upload_that_breaks_goes_on_with_the_rest(
    writable: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "FILES_PER_COMMIT", 1)
    third = Dataset(shared_dataset).manifest.to_pylist()[6]
    writable.faults = [Fault("PUT", f"/large/{third['shard_sha256']}", 403)]
    with pytest.raises(StorageError, match=f"{writable.url}/{REPO}: cannot be written: the token has no right to it"):
        publish_dataset(shared_dataset, "someone/tiny")
    assert sum(name.endswith(".tar") for name in writable.repos[REPO].files) == 2
    writable.requests.clear()
    assert publish_dataset(shared_dataset, "someone/tiny").sent == 2
    assert writable.count("PUT", "/large/") == 2 + 2 + 3  # shards, manifests, histograms
    assert verify(ADDRESS)["ok"]
    writable.requests.clear()
    head = writable.repos[REPO].branches["main"]
    assert publish_dataset(shared_dataset, "someone/tiny").address == f"{ADDRESS}@{head}"
    assert writable.count("PUT", "") == 0
    survived("an upload to a hub that breaks", "storage")


def test_a_lost_answer_to_a_commit_sends_nothing_twice(writable: Hub, shared_dataset: Path) -> None:
    writable.faults = [Fault("POST", "/commit/", None, carried_out=True)]
    with pytest.raises(StorageError, match="does not answer"):
        publish_dataset(shared_dataset, "someone/tiny")
    assert publish_dataset(shared_dataset, "someone/tiny").sent == 0
    assert verify(ADDRESS)["ok"]
    survived("a commit to a hub whose answer is lost", "storage")


def test_a_grown_dataset_adds_what_is_new(writable: Hub, damaged: Path, tiny_teacher: Path) -> None:
    publish_dataset(damaged, "someone/tiny")
    before = Dataset(ADDRESS)
    generate(generate_config(tiny_teacher, damaged, num_trajectories=20))
    assert publish_dataset(damaged, "someone/tiny").sent == 3
    assert Dataset(ADDRESS).plan.counts.trajectories == 20
    assert Dataset(ADDRESS, snapshot=before.fingerprint).manifest.equals(before.manifest)
    assert Dataset(before.root.address).newest
    assert verify(ADDRESS)["ok"]


def test_units_that_were_made_again_replace_their_shards(writable: Hub, damaged: Path, tiny_teacher: Path) -> None:
    publish_dataset(damaged, "someone/tiny")
    shard = shards_of(damaged)[0]
    shutil.rmtree(damaged / "manifests")
    (damaged / "commits" / "00000.json").unlink()
    shard.unlink()
    with pytest.raises(
        UserError, match=r"unfinished: expected 4 units, found 3, without 00000: .*nothing was uploaded"
    ):
        publish_dataset(damaged, "someone/tiny")
    repair(survey(open_folder(damaged), deep=True), grace=0)
    generate(generate_config(tiny_teacher, damaged))
    assert publish_dataset(damaged, "someone/tiny").sent == 1
    names = {name for name in writable.repos[REPO].files if name.endswith(".tar")}
    assert names == {f"shards/{path.name}" for path in shards_of(damaged)}
    assert verify(ADDRESS)["orphans"]["count"] == 0


@pytest.mark.parametrize("name", ["a flipped bit in a payload", "a missing shard", "a manifest of other rows"])
def test_damage_is_refused_before_anything_is_uploaded(writable: Hub, damaged: Path, name: str) -> None:
    DAMAGES[name](damaged)
    with pytest.raises(UserError, match=rf"{damaged}: \d problem\(s\); the first: .*pipeline.verify.*nothing was uplo"):
        publish_dataset(damaged, "someone/tiny")
    assert writable.repos == {}


def test_a_growing_dataset_is_refused(writable: Hub, damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    with pytest.raises(UserError, match=f"{damaged}: is growing: .*makes the rest; nothing was uploaded"):
        publish_dataset(damaged, "someone/tiny")
    assert writable.repos == {}


def changing(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """Have something change the folder after it was found whole."""

    def opened(*given: object) -> Repository:
        change()  # type: ignore[operator]
        return Repository(*given)

    monkeypatch.setattr(publishing, "Repository", opened)


def test_a_shard_that_changes_meanwhile_ends_the_upload(
    writable: Hub, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards_of(damaged)[2]
    changing(monkeypatch, lambda: shard.write_bytes(shard.read_bytes()[:-1] + b"x"))
    with pytest.raises(ChangedError, match=f"^{shard}: has changed since the upload began: wait"):
        publish_dataset(damaged, "someone/tiny")
    assert set(writable.repos[REPO].files) == {".gitattributes"}
    survived("a shard that changes while it is published: one-line error", "dataset")


def test_a_shard_that_goes_meanwhile_ends_the_upload(
    writable: Hub, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards_of(damaged)[2]
    changing(monkeypatch, shard.unlink)
    with pytest.raises(ChangedError, match=f"^{shard}: has changed since the upload began: wait"):
        publish_dataset(damaged, "someone/tiny")
    assert set(writable.repos[REPO].files) == {".gitattributes"}


def test_a_dataset_that_grows_meanwhile_ends_the_upload(
    writable: Hub, damaged: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing(monkeypatch, lambda: generate(generate_config(tiny_teacher, damaged, num_trajectories=20)))
    with pytest.raises(ChangedError, match=f"^{damaged}: has changed since the upload began: wait"):
        publish_dataset(damaged, "someone/tiny")
    with pytest.raises(UserError, match="holds no dataset"):
        Dataset(ADDRESS)
    survived("a dataset that grows while it is published: one-line error", "dataset")


def test_another_writer_is_noticed(writable: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Repository.upload

    def upload_and_push(repo: Repository, *given: object) -> int:
        sent = upload(repo, *given)
        pushed = writable.repos[REPO]
        pushed.commit({**pushed.files, "x": b""}, "of someone else")
        return sent

    monkeypatch.setattr(Repository, "upload", upload_and_push)
    with pytest.raises(StorageError, match="a newer commit, of someone else: give the same command again"):
        publish_dataset(shared_dataset, "someone/tiny")


def test_another_dataset_is_not_replaced(
    writable: Hub, shared_dataset: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    publish_dataset(generate(generate_config(tiny_teacher, tmp_path / "other", seed=1)), "someone/tiny")
    with pytest.raises(UserError, match=f"{REPO}: holds another dataset, or more of this one: take another repo_id"):
        publish_dataset(shared_dataset, "someone/tiny")


def test_a_repository_of_something_else_is_not_replaced(writable: Hub, shared_dataset: Path) -> None:
    files = {"README.md": b"# Mine", "data/train.parquet": b"x", "shards/a.tar": b"x"}
    writable.add(REPO, files)
    with pytest.raises(
        UserError, match=f"{REPO}: holds data/train.parquet, and is no repository of such a dataset: take"
    ):
        publish_dataset(shared_dataset, "someone/tiny")
    assert writable.repos[REPO].files == files


def test_a_branch_of_its_own(writable: Hub, shared_dataset: Path) -> None:
    publish_dataset(shared_dataset, "someone/tiny", branch="second")
    assert Dataset(f"{ADDRESS}@second").fingerprint == Dataset(shared_dataset).fingerprint
    with pytest.raises(UserError, match="holds no dataset"):
        Dataset(ADDRESS)


def test_a_private_dataset(writable: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_dataset(shared_dataset, "someone/tiny", private=True)
    assert writable.repos[REPO].private
    writable.repos[REPO].private = False
    with pytest.raises(UserError, match=f"{REPO}: is public already: make it private on its page"):
        publish_dataset(shared_dataset, "someone/tiny", private=True)


def without_reading(root: Folder, deep: bool) -> Survey:
    assert not deep, "the shards were read"
    return survey(root, deep=False)


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("someone/tiny", None, "no token is given: make one at .*/settings/tokens, and set HF_TOKEN to it"),
        ("someone/tiny", "hf_wrong", "HF_TOKEN is not valid: make one at"),
        ("someone/tiny", READER, "the token has no right to it: give it the right at"),
        ("some one/tiny", WRITER, "not a name of a repository: write OWNER/NAME"),
    ],
)
def test_a_hub_that_refuses_is_one_line(
    hub: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str, token: str | None, message: str
) -> None:
    hub.point_to(monkeypatch, token)
    if token != READER:  # a valid token may be refused only later
        monkeypatch.setattr(publishing, "survey", without_reading)
    with pytest.raises(StorageError, match=f"{repo_id}: cannot be written: {message}") as found:
        publish_dataset(shared_dataset, repo_id)
    assert len(str(found.value).splitlines()) == 1
    assert hub.repos == {}


def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_shards_are_read(
    writable: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "survey", without_reading)
    message = r'REPO: the hub refuses the header of the card: "license" must be one of \[.*mit.*\]; nothing was upl'
    with pytest.raises(UserError, match=message.replace("REPO", REPO)):
        publish_dataset(shared_dataset, "someone/tiny", license="gpl-9.0")
    assert writable.repos == {}


def test_a_dataset_elsewhere_is_refused(writable: Hub, shared_dataset: Path) -> None:
    with pytest.raises(UserError, match="data_dir=s3://bucket/data: is not on this machine: name a local folder"):
        publish_dataset("s3://bucket/data", "someone/tiny")
    with pytest.raises(UserError, match="nothing: holds no dataset"):
        publish_dataset(str(shared_dataset / "nothing"), "someone/tiny")


def test_a_download_that_breaks_goes_on(writable: Hub, shared_dataset: Path, tmp_path: Path) -> None:
    """As `hf download` does it, without a command of ours."""
    publish_dataset(shared_dataset, "someone/tiny")
    third = Dataset(shared_dataset).manifest.to_pylist()[6]
    writable.faults = [Fault("GET", f"/large/{third['shard_sha256']}", 403)]
    download = {"repo_type": "dataset", "local_dir": tmp_path / "copy", "max_workers": 1}
    with pytest.raises(OSError):
        snapshot_download("someone/tiny", **download)
    with pytest.raises(UserError):
        Dataset(tmp_path / "copy")
    writable.requests.clear()
    snapshot_download("someone/tiny", **download)
    assert 0 < writable.count("GET", "/large/") < 4 + 2 + 3
    assert verify(tmp_path / "copy")["ok"]


def test_no_place_on_this_machine_is_published(writable: Hub, tiny_teacher: Path, tmp_path: Path) -> None:
    """Also where a place is part of the plan, whose digest each commit record carries."""
    classes = tmp_path / "classes.txt"
    classes.write_text("1\n2\n")
    config = generate_config(tiny_teacher, tmp_path / "data", class_labels=str(classes), num_trajectories=4)
    config.runtime_env = {"env_vars": {"SECRET": "s"}}
    root = generate(config)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    done = publish_dataset(str(root), "someone/tiny")
    files = writable.repos[REPO].files
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert str(tiny_teacher.parent).encode() not in content, name
    assert b"SECRET" not in files["config.yaml"]
    assert json.loads(files["generation.json"]).keys() == json.loads((root / "generation.json").read_text()).keys() - {
        "workers",
        "quarantined",
    }
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert verify(ADDRESS)["ok"]
    again = publish_dataset(str(root), "someone/tiny")
    assert (again.sent, again.address) == (0, done.address)

    snapshot_download("someone/tiny", repo_type="dataset", local_dir=tmp_path / "copy")
    copied = ["--config", str(tmp_path / "copy" / "config.yaml"), f"output_dir={tmp_path / 'copy'}"]
    copied.append(f"teacher.pretrained_model_name_or_path={tiny_teacher}")
    grown = parse(GenerateConfig, [*copied, f"class_labels={classes}", "num_trajectories=8"])
    generate(grown)
    assert verify(tmp_path / "copy")["ok"]
    assert publish_dataset(str(tmp_path / "copy"), "someone/tiny").sent == 2
    assert verify(ADDRESS)["ok"]
