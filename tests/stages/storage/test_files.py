from __future__ import annotations

import errno
import json
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.errors import StorageError
from stages.storage.files import create, make_folder, whole_file, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with whole_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_content_is_kept_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"after")
        raise RuntimeError
    assert path.read_bytes() == b"before"


def test_one_of_many_creators_wins_and_its_content_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "commit"
    contents = [bytes([i]) * 10_000 for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda content: create(path, content), contents))
    assert sum(won) == 1
    assert path.read_bytes() == contents[won.index(True)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_one_line_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on file size makes the kernel refuse."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written") as raised, whole_file(tmp_path / "big") as file:
            file.write(b"0" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/folder"):
        make_folder(tmp_path / "file" / "folder")


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1]}
