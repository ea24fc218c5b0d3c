"""Datasets, runs and caches on file systems without locks, links or syncs, simulated by their errors."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pipeline.train
from pipeline.verify import VerifyConfig
from pipeline.verify import main as verify
from stages.errors import StorageError, UserError
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.storage import filesystem
from stages.storage.cache import ShardCache
from stages.storage.disk import DiskFolder
from stages.storage.files import create, move, whole_file
from stages.storage.locks import exclusive_lock
from tests.conftest import generate_config, train_config

Refuse = Callable[[Any, str, int], None]
NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES]
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Make a system call fail with an error number."""

    def refuse(module: Any, call: str, number: int) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, call, refused)

    return refuse


@pytest.fixture(params=["a rename that replaces nothing", "renames that replace"])
def rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "renames that replace":
        monkeypatch.setattr(
            filesystem, "RENAME_NOREPLACE", 1 << 20
        )  # an unknown flag: EINVAL, as on systems without it
    return str(request.param)


@pytest.mark.parametrize("number", NO_LINKS)
def test_without_links_a_file_is_made_once(number: int, rename: str, refuse: Refuse, tmp_path: Path) -> None:
    refuse(os, "link", number)
    assert create(tmp_path / "one", b"first")
    assert not create(tmp_path / "one", b"second")
    assert (tmp_path / "one").read_bytes() == b"first"
    assert move(tmp_path / "one", tmp_path / "aside" / "one")
    assert create(tmp_path / "one", b"third")
    assert not move(tmp_path / "one", tmp_path / "aside" / "one")
    assert (tmp_path / "aside" / "one").read_bytes() == b"first"
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "none", tmp_path / "aside" / "two")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["aside", "one", "one"]


def test_without_links_one_of_many_creators_wins(refuse: Refuse, tmp_path: Path) -> None:
    refuse(os, "link", errno.EPERM)
    contents = [bytes([i]) * 10_000 for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda content: create(tmp_path / "commit", content), contents))
    assert sum(won) == 1
    assert (tmp_path / "commit").read_bytes() == contents[won.index(True)]
    assert list(tmp_path.iterdir()) == [tmp_path / "commit"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_files_that_cannot_be_synced_are_written(number: int, refuse: Refuse, tmp_path: Path) -> None:
    refuse(os, "fsync", number)
    with whole_file(tmp_path / "one") as file:
        file.write(b"all")
    assert (tmp_path / "one").read_bytes() == b"all"


def test_a_failed_sync_is_an_error(refuse: Refuse, tmp_path: Path) -> None:
    refuse(os, "fsync", errno.EIO)
    with pytest.raises(StorageError, match="one: cannot be written: Input/output error"):
        create(tmp_path / "one", b"lost")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_a_run_warns_and_continues(number: int, refuse: Refuse, tmp_path: Path) -> None:
    refuse(fcntl, "flock", number)
    with (
        pytest.warns(UserWarning, match="its file system has no locks"),
        exclusive_lock(tmp_path, "another run is training"),
    ):
        (tmp_path / "done").touch()
    with pytest.raises(
        UserError, match=f"cache_dir={tmp_path}: its file system has no locks, .* on a local disk, or none"
    ):
        ShardCache(tmp_path, 1 << 20)


def test_a_dataset_is_made_trained_on_and_repaired_without_locks_links_and_syncs(
    tiny_teacher: Path, refuse: Refuse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, call, number in (
        (fcntl, "flock", errno.ENOLCK),
        (os, "link", errno.EPERM),
        (os, "fsync", errno.EINVAL),
    ):
        refuse(module, call, number)
    config = generate_config(tiny_teacher, tmp_path / "data")
    Driver(config).run(InProcessFleet(config))
    next((tmp_path / "data" / "shards").glob("00001-*")).write_bytes(b"damage")
    with pytest.raises(UserError, match="makes the rest"):
        verify(VerifyConfig(str(tmp_path / "data"), repair=True))
    Driver(config).run(InProcessFleet(config))
    verify(VerifyConfig(str(tmp_path / "data")))
    assert capsys.readouterr().out.endswith("whole: nothing is missing or damaged\n")
    with pytest.warns(UserWarning, match="no locks"):
        pipeline.train.main(train_config(tmp_path / "data", tmp_path / "run", max_train_steps=2))
    assert (tmp_path / "run" / "training.json").exists()


def test_a_cache_that_cannot_be_written_to_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # root may write anywhere
    with pytest.raises(StorageError, match="cannot be written: Is a directory: name another cache_dir, or none"):
        ShardCache(tmp_path, 1 << 20)


READ_ONLY = """
import sys
import pipeline.train
from pathlib import Path
from pipeline.command import run
from pipeline.verify import VerifyConfig, main
from tests.conftest import train_config
data, output = map(Path, sys.argv[1:3])
pipeline.train.main(train_config(data, output, max_train_steps=2))
sys.argv[1:] = [f"data_dir={data}"]
run(VerifyConfig, main, "")
"""


def test_a_read_only_dataset_is_trained_on_and_verified(damaged: Path, tmp_path: Path) -> None:
    """A real read-only mount, if this machine allows mounts."""
    mount = f'mount --bind "{damaged}" "{damaged}" && mount -o remount,ro,bind "{damaged}"'
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mounts")
    (tmp_path / "read.py").write_text(READ_ONLY)
    command = f'{mount} && exec "{sys.executable}" "{tmp_path}/read.py" "{damaged}" "{tmp_path}/run"'
    ended = subprocess.run(
        ["unshare", "-m", "bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("whole: nothing is missing or damaged\n")
    message = f"warning: {damaged}/verification.json: cannot be written: Read-only file system: say output=FILE"
    assert message in ended.stderr
    assert (tmp_path / "run" / "training.json").exists()


def test_a_writable_folder_that_cannot_be_listed_is_synced_as_far_as_possible(refuse: Refuse, tmp_path: Path) -> None:
    refuse(os, "open", errno.EACCES)
    filesystem.sync_folder(tmp_path)
    assert DiskFolder(str(tmp_path)).list("") == {}
