"""A commit of a dataset on a hub, as a folder."""

from __future__ import annotations

import pytest

from stages.errors import StorageError
from stages.storage.folder import READ_SIZE, open_folder
from stages.storage.hub import HubFolder
from tests.support.faulty_s3 import Fault
from tests.support.hub import PAGE, Hub

CONTENT = b"".join(i.to_bytes(4, "little") for i in range(3 * READ_SIZE // 8))
FILES = {"a.tar": CONTENT, "b.json": CONTENT, "c/d/e.json": b"", **{f"c/{i:02d}": bytes(i) for i in range(3 * PAGE)}}


@pytest.fixture
def repo(hub: Hub) -> Hub:
    hub.add("datasets/someone/files", FILES)
    return hub


@pytest.mark.parametrize("name", ["a.tar", "b.json"])  # a large file is elsewhere
def test_parts_of_a_file_are_read_from_any_offset(repo: Hub, name: str) -> None:
    with open_folder("hf://datasets/someone/files").open(name) as file:
        assert file.seek(0, 2) == len(CONTENT)
        for start, length in ((0, 10), (READ_SIZE - 3, 9), (100, READ_SIZE + 100), (len(CONTENT) - 5, 99), (7, 0)):
            file.seek(start)
            assert file.read(length) == CONTENT[start : start + length]
        file.seek(5)
        assert file.read() == CONTENT[5:]


def test_names_are_listed_once(repo: Hub) -> None:
    folder = open_folder("hf://datasets/someone/files@main/")
    assert folder.list("c") == {f"c/{i:02d}": i for i in range(3 * PAGE)}
    assert folder.list("") == {"a.tar": len(CONTENT), "b.json": len(CONTENT)}
    assert folder.list("nothing") == folder.leftovers("c") == {}
    pages = repo.count("GET", "/tree/")
    assert pages > 3
    assert folder.exists("c/d/e.json")
    assert not folder.exists("c")
    with pytest.raises(FileNotFoundError):
        folder.open("c/d")
    assert folder.read("c/d") is None
    assert folder.read("c/03") == bytes(3)
    assert repo.count("GET", "/tree/") == pages


def test_an_address_with_a_commit_asks_for_no_branch(repo: Hub) -> None:
    folder = open_folder("hf://datasets/someone/files")
    assert isinstance(folder, HubFolder)
    assert str(folder) == f"hf://datasets/someone/files@{folder.commit}"
    repo.requests.clear()
    assert open_folder(str(folder)).where("a.tar") == f"{folder}/a.tar"
    assert repo.requests == []


def test_a_server_that_knows_no_ranges_is_read_all_the_same(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = repo.server.RequestHandlerClass
    monkeypatch.setattr(handler, "part_of", lambda self, content, headers: (content, headers, 200))
    with open_folder("hf://datasets/someone/files").open("b.json") as file:
        file.seek(8)
        assert file.read(8) == CONTENT[8:16]


def test_a_request_is_tried_again(repo: Hub) -> None:
    folder = open_folder("hf://datasets/someone/files")
    repo.faults = [Fault("GET", "resolve", 503)]
    assert folder.read("c/03") == bytes(3)
    repo.faults = [Fault("GET", "resolve", 403)]
    with pytest.raises(StorageError, match=f"{folder}/c/03: cannot be read: the token has no right to it"):
        folder.read("c/03")
