from __future__ import annotations

from collections.abc import Callable
from typing import Any

import obstore.store
import pytest

from stages.errors import StorageError
from stages.storage import bucket
from stages.storage.folder import Folder, open_folder
from tests.support.faults_table import survived
from tests.support.faulty_s3 import Fault, FaultyS3

MULTIPART = 6 << 20  # more than one part of an upload


def answer(status: int | None) -> str:
    return "no answer" if status is None else str(status)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open stores that retry once and wait half a second for an answer."""

    def open_store(address: str) -> obstore.store.ObjectStore:
        options: Any = {"allow_http": True, "timeout": "500ms"}
        return obstore.store.from_url(address, client_options=options, retry_config={"max_retries": 1})

    monkeypatch.setattr(bucket, "open_store", open_store)


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
def test_transient_errors_are_retried(s3: FaultyS3, status: int | None) -> None:
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
def test_each_part_of_a_large_upload_is_retried(s3: FaultyS3, status: int) -> None:
    s3.faults = [Fault("PUT", "partNumber=2", status), Fault("POST", "uploadId", status)]
    content = bytes(range(256)) * (MULTIPART // 256)
    open_folder("s3://bucket/data").write("a", content)
    assert [fault.times for fault in s3.faults] == [0, 0]
    assert s3.get("data/a") == content
    survived(f"{answer(status)} to a part of an upload, and to its end", "storage")


@pytest.mark.parametrize("fault", [Fault("PUT", "partNumber=2", 403), Fault("POST", "uploadId", 403)])
def test_an_upload_refused_in_the_middle_leaves_nothing_behind(s3: FaultyS3, fault: Fault) -> None:
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
def test_a_lasting_refusal_is_one_line(s3: FaultyS3, method: str, done: Refused, message: str) -> None:
    s3.put("data/a", b"content")
    s3.faults = [Fault(method, "bucket", 503, times=99)]
    with pytest.raises(StorageError, match=f"^s3://bucket/{message}: .*503.*$"):
        done(open_folder("s3://bucket/data/"))
    survived("503 to each try of a request: one-line error", "storage")


@pytest.mark.usefixtures("impatient")
def test_a_request_that_times_out_is_retried(s3: FaultyS3) -> None:
    folder = open_folder("s3://bucket/data")
    s3.faults = [Fault("PUT", "data/a", 200, seconds=1), Fault("GET", "data/a", 200, seconds=1)]
    folder.write("a", b"content")
    assert folder.read("a") == b"content"
    assert [fault.times for fault in s3.faults] == [0, 0]
    survived("an answer that takes too long", "storage")


# Outcomes of a conditional write whose answer is missing or wrong.
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
def test_the_content_shows_which_writer_was_first(s3: FaultyS3, name: str) -> None:
    folder, faults = open_folder("s3://bucket/data"), AMBIGUOUS[name]
    for content, won in ((b"ours", True), (b"theirs", False)):
        s3.faults = [Fault(**vars(fault)) for fault in faults]
        assert folder.create("commit", content) is won
        assert [fault.times for fault in s3.faults[:1]] == [0]
        survived(f"a conditional write: {name}", "storage")
    assert s3.get("data/commit") == b"ours"


@pytest.mark.usefixtures("impatient")
def test_a_write_that_never_arrives_does_not_win(s3: FaultyS3) -> None:
    s3.faults = [Fault("PUT", "commit", 409, times=99)]
    with pytest.raises(StorageError, match="s3://bucket/data/commit: cannot be written: .*409"):
        open_folder("s3://bucket/data").create("commit", b"ours")
    assert s3.count("PUT", "commit") == bucket.CREATE_ATTEMPTS
    survived("a conditional write that never arrives: one-line error", "storage")


def test_a_missing_bucket_is_named(s3: FaultyS3) -> None:
    folder = open_folder("s3://nowhere/data")
    assert folder.read("a") is None
    for done in (lambda: folder.write("a", b""), lambda: folder.create("a", b"")):
        with pytest.raises(StorageError, match="s3://nowhere/data/a: cannot be written"):
            done()
    survived("no such bucket: one-line error", "storage")


def test_a_full_temporary_folder_is_named(s3: FaultyS3) -> None:
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
    """These tests send requests to S3 only: there is no local server for the other two."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    folder = open_folder(address)
    assert isinstance(folder, bucket.BucketFolder)
    assert type(folder.store) is kind
    assert folder.store.prefix == "a/b"
    assert str(folder) == address
