from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore.store
import pytest

from stages.errors import StorageError, UserError
from stages.storage import folder as module
from stages.storage.folder import READ_SIZE, Folder, absolute, open_folder
from tests.support.faults_table import survived
from tests.support.faulty_s3 import Fault, FaultyS3

MULTIPART = 6 << 20  # more than one part of an upload


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty place of each kind."""
    if request.param == "disk":
        return open_folder(tmp_path / "some" / "where")
    request.getfixturevalue("s3")
    return open_folder("s3://bucket/some/where")


def answer(status: int | None) -> str:
    return "no answer" if status is None else str(status)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores with less patience than obstore's own: one more try, and half a second for an answer."""

    def open_store(address: str) -> obstore.store.ObjectStore:
        options: Any = {"allow_http": True, "timeout": "500ms"}
        return obstore.store.from_url(address, client_options=options, retry_config={"max_retries": 1})

    monkeypatch.setattr(module, "open_store", open_store)


def test_what_was_written_is_read(folder: Folder) -> None:
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


def test_what_is_written_aside_is_told_by_itself(folder: Folder) -> None:
    folder.write("shards/a.tar", b"whole")
    with folder.whole_file("shards/b.tar"):
        aside = folder.leftovers("shards")
    assert [name.rpartition(".b.tar.")[0] for name in aside] == (["shards/"] if "://" not in str(folder) else [])
    assert folder.leftovers("shards") == {}


def test_the_place_has_its_own_clock(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_an_exception_while_writing_leaves_what_was_there(folder: Folder, size: int) -> None:
    for before in (None, b"before"):
        if before is not None:
            folder.write("shards/a.tar", before)
        with pytest.raises(RuntimeError), folder.whole_file("shards/a.tar") as file:
            file.write(bytes(size))
            raise RuntimeError
        assert folder.read("shards/a.tar") == before


def test_parts_of_a_file_are_read_from_any_place(folder: Folder) -> None:
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


def test_neighbouring_parts_take_one_request(s3: FaultyS3) -> None:
    folder = open_folder("s3://bucket/data")
    folder.write("a", bytes(100_000))
    s3.requests.clear()
    with folder.open("a") as file:
        for start in range(0, 100_000, 1000):
            file.seek(start)
            file.read(1000)
    assert s3.count("GET", "data/a") == 1


@pytest.mark.parametrize("status", [500, 503, None])
def test_what_is_transient_is_tried_again(s3: FaultyS3, status: int | None) -> None:
    folder = open_folder("s3://bucket/data")
    for method, done in (
        ("PUT", lambda: folder.write("a", b"content")),
        ("GET", lambda: folder.read("a")),
        ("HEAD", lambda: folder.open("a").close()),
        ("GET", lambda: folder.list("b")),
    ):
        s3.faults = [Fault(method, "bucket", status, times=2)]
        done()
        assert s3.faults[0].times == 0
        survived(f"{answer(status)} to a request", "storage")
    assert folder.read("a") == b"content"


@pytest.mark.parametrize("status", [500, 503])
def test_each_part_of_a_large_upload_is_tried_again(s3: FaultyS3, status: int) -> None:
    s3.faults = [Fault("PUT", "partNumber=2", status), Fault("POST", "uploadId", status)]
    content = bytes(range(256)) * (MULTIPART // 256)
    open_folder("s3://bucket/data").write("a", content)
    assert [fault.times for fault in s3.faults] == [0, 0]
    assert s3.get("data/a") == content
    survived(f"{answer(status)} to a part of an upload, and to its end", "storage")


@pytest.mark.parametrize("fault", [Fault("PUT", "partNumber=2", 403), Fault("POST", "uploadId", 403)])
def test_an_upload_refused_in_the_middle_leaves_nothing(s3: FaultyS3, fault: Fault) -> None:
    s3.faults = [fault]
    with pytest.raises(StorageError, match=r"^s3://bucket/data/a: cannot be written: .*$"):
        open_folder("s3://bucket/data").write("a", bytes(MULTIPART))
    assert s3.names() == []
    assert list(s3.bucket.multipart_uploads.all()) == []
    survived("an upload refused in the middle", "storage")


Refused = Callable[[Folder], object]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("method", "done", "message"),
    [
        ("PUT", lambda folder: folder.write("b", b""), "data/b: cannot be written"),
        ("PUT", lambda folder: folder.create("b", b""), "data/b: cannot be written"),
        ("GET", lambda folder: folder.read("a"), "data/a: cannot be read"),
        ("HEAD", lambda folder: folder.open("a"), "data/a: cannot be read"),
        ("GET", lambda folder: folder.open("a").read(1), "data/a: cannot be read"),
        ("GET", lambda folder: folder.list("b"), "data/b: cannot be listed"),
    ],
)
def test_what_does_not_pass_is_told_in_a_line(s3: FaultyS3, method: str, done: Refused, message: str) -> None:
    s3.put("data/a", b"content")
    s3.faults = [Fault(method, "bucket", 503, times=99)]
    with pytest.raises(StorageError, match=f"^s3://bucket/{message}: .*503.*$"):
        done(open_folder("s3://bucket/data/"))
    survived("503 to each try of a request: told in one line", "storage")


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_takes_too_long_is_asked_for_again(s3: FaultyS3) -> None:
    folder = open_folder("s3://bucket/data")
    s3.faults = [Fault("PUT", "data/a", 200, seconds=1), Fault("GET", "data/a", 200, seconds=1)]
    folder.write("a", b"content")
    assert folder.read("a") == b"content"
    assert [fault.times for fault in s3.faults] == [0, 0]
    survived("an answer that takes too long", "storage")


# What may come of a conditional write whose answer tells nothing, or the wrong thing.
AMBIGUOUS = {
    "409 and nothing is there": [Fault("PUT", "commit", 409)],
    "412 and nothing is there": [Fault("PUT", "commit", 412)],
    "500, and then 412 for our own": [Fault("PUT", "commit", 500, carried_out=True)],
    "503, and then 412 for our own": [Fault("PUT", "commit", 503, carried_out=True)],
    "409 for our own": [Fault("PUT", "commit", 409, carried_out=True)],
    "no answer, not done": [Fault("PUT", "commit", None)],
    "no answer, done": [Fault("PUT", "commit", None, carried_out=True)],
    "time-out, not done": [Fault("PUT", "commit", 200, seconds=1)],
    "time-out, done": [Fault("PUT", "commit", 200, seconds=1, carried_out=True)],
    "no answer, done, and a slow look": [
        Fault("PUT", "commit", None, carried_out=True),
        Fault("GET", "commit", 503),
    ],
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_who_wrote_first_is_told_by_what_is_there(s3: FaultyS3, name: str) -> None:
    folder, faults = open_folder("s3://bucket/data"), AMBIGUOUS[name]
    for content, won in ((b"ours", True), (b"theirs", False)):
        s3.faults = [Fault(**vars(fault)) for fault in faults]
        assert folder.create("commit", content) is won
        assert [fault.times for fault in s3.faults[:1]] == [0]
        survived(f"a conditional write: {name}", "storage")
    assert s3.get("data/commit") == b"ours"


@pytest.mark.usefixtures("impatient")
def test_a_write_that_never_arrives_is_not_won(s3: FaultyS3) -> None:
    s3.faults = [Fault("PUT", "commit", 409, times=99)]
    with pytest.raises(StorageError, match="s3://bucket/data/commit: cannot be written: .*409"):
        open_folder("s3://bucket/data").create("commit", b"ours")
    assert s3.count("PUT", "commit") == module.CREATE_ATTEMPTS
    survived("a conditional write that never arrives: told in one line", "storage")


def test_a_bucket_that_is_not_there_is_named(s3: FaultyS3) -> None:
    folder = open_folder("s3://nowhere/data")
    assert folder.read("a") is None
    for done in (lambda: folder.write("a", b""), lambda: folder.create("a", b"")):
        with pytest.raises(StorageError, match="s3://nowhere/data/a: cannot be written"):
            done()
    survived("no such bucket: told in one line", "storage")


def test_where_there_is_no_room_to_stage_is_told(s3: FaultyS3) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(StorageError, match="s3://bucket/data/a: cannot be written: .*File too large"):
            open_folder("s3://bucket/data").write("a", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert s3.names() == []
    survived("no room to stage an upload", "storage")


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("s3://bucket/a/b", obstore.store.S3Store),
        ("gs://bucket/a/b", obstore.store.GCSStore),
        ("az://container/a/b", obstore.store.AzureStore),
    ],
)
def test_each_address_has_its_kind_of_store(address: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only S3 is spoken to in these tests: no server for the other two runs here."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    folder = open_folder(address)
    assert isinstance(folder, module.BucketFolder)
    assert type(folder.store) is kind
    assert folder.store.prefix == "a/b"
    assert str(folder) == address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/data", "ftp://host/data: neither a local folder nor one of s3://, gs://, az://"),
        ("memory:///data", "neither a local folder"),
        ("s3://", "s3://: no bucket that can be opened"),
        ("az://container/data", "az://container/data: no bucket that can be opened: .*Account must be specified"),
    ],
)
def test_what_is_no_place_for_a_dataset_is_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UserError, match=message) as error:
        open_folder(address)
    assert "\n" not in str(error.value)


def test_a_place_has_a_name_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("data/one") == str(tmp_path.resolve() / "data" / "one")
    assert absolute("s3://bucket/data") == "s3://bucket/data"
