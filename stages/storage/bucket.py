"""Object stores by their address; endpoint and credentials come from the usual environment variables."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, cast

import obstore
import obstore.store
from obstore.exceptions import BaseError

from stages.errors import StorageError, UserError
from stages.storage.folder import READ_SIZE, Folder

SCHEMES = ("s3://", "gs://", "az://")
CREATE_ATTEMPTS = 3
PROBE = ".probe"


def open_store(address: str) -> obstore.store.ObjectStore:
    """The store at an address such as `s3://bucket/prefix`, in which names are relative to the prefix."""
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        return obstore.store.from_url(address, client_options={"allow_http": True})
    return obstore.store.from_url(address)


def read_object(address: str) -> bytes:
    """The content of an object such as `s3://bucket/prefix/name`.

    Raises:
        ValueError, obstore.exceptions.BaseError: it could not be read.
    """
    folder, _, name = address.rpartition("/")
    return bytes(obstore.get(open_store(folder), name).bytes())


def open_bucket(address: str) -> BucketFolder:
    """The folder at an address such as `s3://bucket/prefix`.

    Raises:
        UserError: the environment does not say enough about it.
    """
    try:
        return BucketFolder(address)
    except (BaseError, ValueError) as error:
        raise UserError(f"{address}: no bucket that can be opened: {_reason(error)}") from error


class BucketFolder(Folder):
    """A prefix in a bucket. What is transient (500, 503, a lost connection) is tried again by obstore's own rules."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.store = open_store(address)

    def where(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        try:
            with self._errors_named(name, "read"):
                return bytes(obstore.get(self.store, name).bytes())
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        with self._errors_named(name, "read"):
            size = obstore.head(self.store, name)["size"]
        return io.BufferedReader(_Object(self, name, size), READ_SIZE)

    def exists(self, name: str) -> bool:
        try:
            with self._errors_named(name, "read"):
                obstore.head(self.store, name)
        except FileNotFoundError:
            return False
        return True

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """A part of a file that is there."""
        with self._errors_named(name, "read"):
            return bytes(obstore.get_range(self.store, name, start=start, length=length))

    def list(self, folder: str) -> dict[str, int]:
        with self._errors_named(folder, "listed"):
            found = [(str(meta["path"]), meta["size"]) for metas in obstore.list(self.store, folder) for meta in metas]
        return dict(sorted(found))

    @contextmanager
    def whole_file(self, name: str) -> Iterator[BinaryIO]:
        try:
            with tempfile.TemporaryFile() as file:
                yield cast(BinaryIO, file)
                file.seek(0)
                obstore.put(self.store, name, file)
        except (BaseError, OSError) as error:
            raise self._refused(name, "written", error) from error

    def create(self, name: str, content: bytes) -> bool:
        for _ in range(CREATE_ATTEMPTS):
            try:
                obstore.put(self.store, name, content, mode="create")
                return True
            except (BaseError, OSError) as error:
                failure = error
            # Someone was first, or our own request arrived and its answer did not: what is there tells.
            if (found := self.read(name)) is not None:
                return found == content
        raise self._refused(name, "written", failure) from failure

    def probe(self, way_out: str = "take another output_dir") -> None:
        try:
            self.create(PROBE, b"")  # as commits are
        except StorageError as error:
            raise StorageError(f"{error}: {way_out}") from error
        with suppress(StorageError):  # some may add and not remove
            self.delete(PROBE)

    def free(self) -> int | None:
        return None

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._errors_named(name, "removed"):
            obstore.delete(self.store, name)

    def move(self, name: str, to: str) -> bool:
        if self.exists(to):
            return False
        with self._errors_named(name, "moved"):
            obstore.copy(self.store, name, to)
        self.delete(name)
        return True

    def leftovers(self, folder: str) -> dict[str, int]:
        return {}  # an upload that was not ended is no object

    def modified(self, name: str) -> float:
        with self._errors_named(name, "read"):
            return obstore.head(self.store, name)["last_modified"].timestamp()

    @contextmanager
    def _errors_named(self, name: str, done: str) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            raise self._refused(name, done, error) from error

    def _refused(self, name: str, done: str, error: Exception) -> StorageError:
        return StorageError(f"{self.where(name)}: cannot be {done}: {_reason(error)}")


class _Object(io.RawIOBase):
    """An object as a file, each read of which is a request: for a buffer around it."""

    def __init__(self, folder: BucketFolder, name: str, size: int) -> None:
        self.folder, self.name, self.size, self.place = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self.size - self.place)
        if length <= 0:
            return 0
        content = self.folder.read_range(self.name, self.place, length)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
