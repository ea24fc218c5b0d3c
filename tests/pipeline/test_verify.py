from __future__ import annotations

import errno
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.generate
from pipeline.verify import VerifyConfig, main
from stages.configuration.options import to_yaml
from stages.configuration.parsing import parse
from stages.errors import StorageError, UserError
from stages.generate.config import GenerateConfig
from stages.generate.in_process import InProcessFleet
from stages.records.commits import read_commits
from stages.records.dataset import Dataset
from stages.storage.folder import open_folder
from tests.conftest import generate_config
from tests.stages.generate.test_driver import assert_same_records
from tests.support.damages import DAMAGES, commit_of
from tests.support.faulty_s3 import Fault, FaultyS3


def test_the_content_of_a_dataset_is_printed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(VerifyConfig(str(damaged)))
    output = capsys.readouterr().out
    assert "12 trajectories, 48 records, 4 shards" in output
    assert output.splitlines()[-1] == "whole: nothing is missing or damaged"
    assert (damaged / "verification.json").exists()
    main(VerifyConfig(str(damaged), deep=False))
    output = capsys.readouterr().out
    assert "timestep" not in output
    assert output.splitlines()[-1] == "whole: nothing is missing or damaged; no shard was read"


def test_every_problem_is_listed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted((damaged / "shards").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(b"")
    with pytest.raises(UserError, match=f"2 problem.*`python -m pipeline.verify data_dir={damaged} repair=true`"):
        main(VerifyConfig(str(damaged)))
    output = capsys.readouterr().out
    assert f"shards/{shards[0].name}: expected" in output
    assert f"shards/{shards[1].name}: expected" in output


def test_the_command_that_a_repair_prints_last_finishes_the_dataset(
    damaged: Path,
    shared_dataset: Path,
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("stages.generate.fleet.RayFleet", InProcessFleet)
    damaged = damaged.rename(damaged.with_name("two words"))
    (damaged / "config.yaml").unlink()
    shard = commit_of(damaged)["shard"]
    DAMAGES["a flipped bit in a payload"](damaged)
    DAMAGES["a missing manifest"](damaged)
    with pytest.raises(UserError, match="unfinished: expected 4 units, found 3, without 00001: run the command that"):
        main(VerifyConfig(str(damaged), repair=True))
    output = capsys.readouterr().out
    assert re.search(rf"  {shard}: expected SHA-256 \w+, found \w+: moved to quarantine/{shard}\n", output)
    found = json.loads((damaged / "verification.json").read_text())
    assert [line["shard"] for line in found["repaired"]] == ["commits/00001.json", shard]
    assert (found["ok"], found["trajectories"], len(found["problems"])) == (False, 9, 2)
    (damaged / "config.yaml").write_text(to_yaml(generate_config(tiny_teacher, "elsewhere")))
    with pytest.raises(UserError, match="makes the rest$") as caught:
        main(VerifyConfig(str(damaged)))
    command = re.search("`python -m pipeline.generate (.*)`", str(caught.value))
    assert command is not None
    overrides = shlex.split(command[1])
    pipeline.generate.main(parse(GenerateConfig, overrides))
    main(VerifyConfig(str(damaged)))
    assert_same_records(damaged, shared_dataset)


def test_a_repair_that_leaves_nothing_to_make_succeeds(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / "manifest.parquet").unlink()
    (damaged / "shards" / "00001-0badcafe.tar").write_bytes(b"orphan")
    main(VerifyConfig(str(damaged), repair=True))
    output = capsys.readouterr().out
    assert "orphans of attempts that were ended: 1, 6 bytes: shards/00001-0badcafe.tar" in output
    assert "  manifest.parquet: expected SHA-256" in output
    assert "found no such file: manifests written again from the commits" in output
    found = json.loads((damaged / "verification.json").read_text())
    assert (found["ok"], found["problems"], found["orphans"]["count"]) == (True, [], 1)
    assert sum(bin["count"] for bin in found["histograms"]["timestep"]) == 48
    main(VerifyConfig(str(damaged), repair=True, grace=0))
    output = capsys.readouterr().out
    assert "orphans" not in output
    assert "shards/00001-0badcafe.tar: expected a commit record that names it, found none: removed: 6 bytes" in output


def test_a_negative_grace_is_refused(damaged: Path) -> None:
    with pytest.raises(UserError, match="grace=-1: at least 0"):
        main(VerifyConfig(str(damaged), grace=-1))


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(
    damaged: Path, tmp_path: Path, s3: FaultyS3, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output, message in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "file" / "v.json", "cannot be made: (File exists|Not a directory): name a file elsewhere"),
    ):
        with pytest.raises(StorageError, match=rf"^output={output}: .*{message}$"):
            main(VerifyConfig(str(damaged), output=str(output)))
    s3.faults = [Fault("PUT", "bucket", 403, times=99)]
    message = r"^output=s3://bucket/v.json: s3://bucket/.probe: cannot be written: .*: name a file elsewhere$"
    with pytest.raises(StorageError, match=message):
        main(VerifyConfig(str(damaged), output="s3://bucket/v.json"))
    assert capsys.readouterr().out == ""


def test_a_report_goes_to_its_output(damaged: Path, tmp_path: Path, s3: FaultyS3) -> None:
    (tmp_path / "pipe").symlink_to("/dev/null")
    for output in (str(tmp_path / "new" / "v.json"), str(tmp_path / "pipe"), "s3://bucket/reports/v.json"):
        main(VerifyConfig(str(damaged), output=output))
    assert json.loads((tmp_path / "new" / "v.json").read_bytes())["ok"]
    assert (tmp_path / "pipe").is_char_device()
    assert json.loads(open_folder("s3://bucket/reports").read("v.json") or b"")["ok"]
    assert not (damaged / "verification.json").exists()
    assert not Path("s3:").exists()


@pytest.mark.parametrize("name", ["dataset.json", "commits/00001.json", "shards/*"])
def test_files_of_another_user_are_neither_damage_nor_set_aside(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Files of another user. Root may read everything, so the test raises the system's error itself."""
    before = sorted(path for path in damaged.rglob("*") if path.is_file())
    forbidden = next(damaged.glob(name))
    opened = Path.open

    def refused(self: Path, *given: Any, **named: Any) -> Any:
        if self == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    message = f"^{forbidden}: may not be read by this user: let its owner run `chmod -R a\\+rX` on the dataset$"
    with pytest.raises(StorageError, match=message):
        main(VerifyConfig(str(damaged), repair=True))
    with pytest.raises(StorageError, match=message):
        list(read_all(damaged))
    assert sorted(path for path in damaged.rglob("*") if path.is_file()) == before


def read_all(folder: Path) -> Iterator[object]:
    """Open everything that a reader of a dataset opens."""
    dataset = Dataset(folder)
    for row in dataset.manifest.to_pylist():
        with dataset.open(row["shard"]) as file:
            yield dataset.read(file, row)
    yield from read_commits(dataset.root)


def test_the_command_in_a_readers_error_finishes_the_dataset(
    damaged: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.generate.fleet.RayFleet", InProcessFleet)
    (damaged / "commits" / "00001.json").unlink()
    with pytest.raises(UserError, match=r"unfinished, 3 of 4 units are there: `.*` makes the rest$") as caught:
        Dataset(damaged)
    command = re.search("`python -m pipeline.generate (.*)`", str(caught.value))
    assert command is not None
    overrides = shlex.split(command[1])
    pipeline.generate.main(parse(GenerateConfig, overrides))
    assert len(Dataset(damaged).manifest) == 12


def test_a_repair_of_a_read_only_dataset_is_refused_before_anything_is_read(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stages.storage.files.sync", lambda _: fail_as(errno.EROFS))
    with pytest.raises(
        StorageError, match=f"^{damaged}: cannot be written: Read-only file system: leave repair=true out"
    ):
        main(VerifyConfig(str(damaged), repair=True))
    assert capsys.readouterr().out == ""


def fail_as(number: int) -> None:
    raise OSError(number, os.strerror(number))
