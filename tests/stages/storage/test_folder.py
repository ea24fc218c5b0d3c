from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.storage.folder import READ_SIZE, Folder, absolute, open_folder

MULTIPART = 6 << 20  # more than one part of an upload


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder on a disk and in a bucket."""
    if request.param == "disk":
        return open_folder(tmp_path / "some" / "where")
    request.getfixturevalue("s3")
    return open_folder("s3://bucket/some/where")


def test_written_files_are_read_back(folder: Folder) -> None:
    assert folder.read("a.json") is None
    assert folder.list("shards") == {}
    with pytest.raises(FileNotFoundError):
        folder.open("shards/b.tar")
    folder.write("a.json", b"one")
    folder.write("a.json", b"two")
    for name, content in (("b", b"1"), ("a", b"22")):
        folder.write(f"shards/{name}.tar", content)
    folder.write("shards2/c.tar", b"")
    assert folder.read("a.json") == b"two"
    assert list(folder.list("shards").items()) == [("shards/a.tar", 2), ("shards/b.tar", 1)]
    folder.delete("shards/a.tar")
    assert list(folder.list("shards")) == ["shards/b.tar"]
    assert folder.where("a.json") == f"{folder}/a.json"


def test_a_file_is_moved_unless_the_name_is_taken(folder: Folder) -> None:
    folder.write("a", b"one")
    assert folder.move("a", "aside/a")
    folder.write("a", b"two")
    assert not folder.move("a", "aside/a")
    assert (folder.read("a"), folder.read("aside/a")) == (b"two", b"one")
    for done in (lambda: folder.move("b", "aside/b"), lambda: folder.modified("b")):
        with pytest.raises(FileNotFoundError):
            done()
    folder.delete("b")
    assert list(folder.list("aside")) == ["aside/a"]


def test_temporary_files_are_listed_by_themselves(folder: Folder) -> None:
    folder.write("shards/a.tar", b"whole")
    with folder.whole_file("shards/b.tar"):
        aside = folder.leftovers("shards")
    assert [name.rpartition(".b.tar.")[0] for name in aside] == (["shards/"] if "://" not in str(folder) else [])
    assert folder.leftovers("shards") == {}


def test_the_storage_has_its_own_clock(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("a", b"")
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 1e6)
    assert 0 <= folder.now() - folder.modified("a") < 60
    assert not folder.exists(".now")


@pytest.mark.parametrize("size", [0, 100, MULTIPART])
def test_a_file_appears_whole_and_can_be_read_back_before(folder: Folder, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"end"
    with folder.whole_file("shards/a.tar") as file:
        file.write(content)
        file.seek(0)
        assert file.read(10) == content[:10]
        assert folder.read("shards/a.tar") is None
    assert folder.read("shards/a.tar") == content


@pytest.mark.parametrize("size", [100, MULTIPART])
def test_an_exception_while_writing_keeps_the_old_content(folder: Folder, size: int) -> None:
    for before in (None, b"before"):
        if before is not None:
            folder.write("shards/a.tar", before)
        with pytest.raises(RuntimeError), folder.whole_file("shards/a.tar") as file:
            file.write(bytes(size))
            raise RuntimeError
        assert folder.read("shards/a.tar") == before


def test_parts_of_a_file_are_read_from_any_offset(folder: Folder) -> None:
    content = b"".join(i.to_bytes(4, "little") for i in range(3 * READ_SIZE // 8))
    folder.write("a", content)
    with folder.open("a") as file:
        assert file.seek(0, 2) == len(content)
        for start, length in ((0, 10), (READ_SIZE - 3, 9), (100, READ_SIZE + 100), (len(content) - 5, 99), (7, 0)):
            file.seek(start)
            assert file.read(length) == content[start : start + length]
        file.seek(5)
        assert file.tell() == 5
        assert file.read() == content[5:]


def test_one_of_many_creators_wins(folder: Folder) -> None:
    contents = [bytes([i]) * 1000 for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda content: folder.create("commits/1.json", content), contents))
    assert sum(won) == 1
    assert folder.read("commits/1.json") == contents[won.index(True)]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/data", "ftp://host/data: neither a local folder nor one of s3://, gs://, az://"),
        ("memory:///data", "neither a local folder"),
        ("s3://", "s3://: no bucket that can be opened"),
        ("az://container/data", "az://container/data: no bucket that can be opened: .*Account must be specified"),
    ],
)
def test_other_addresses_are_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UserError, match=message) as error:
        open_folder(address)
    assert "\n" not in str(error.value)


def test_an_absolute_address_is_valid_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("data/one") == str(tmp_path.resolve() / "data" / "one")
    assert absolute("s3://bucket/data") == "s3://bucket/data"
