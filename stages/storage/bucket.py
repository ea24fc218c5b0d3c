"""Buckets: object stores by their address. Endpoint and credentials come from the usual environment variables."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import BinaryIO, cast

import obstore
import obstore.store
from obstore.exceptions import BaseError

from stages.errors import StorageError, UserError
from stages.storage.folder import Folder
from stages.storage.ranges import ranged_file

SCHEMES = ("s3://", "gs://", "az://")
CREATE_ATTEMPTS = 3
PROBE = ".probe"


def open_store(address: str) -> obstore.store.ObjectStore:
    """Open the store at an address such as `s3://bucket/prefix`; its names are relative to the prefix."""
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        return obstore.store.from_url(address, client_options={"allow_http": True})
    return obstore.store.from_url(address)


def read_object(address: str) -> bytes:
    """Read an object such as `s3://bucket/prefix/name`.

    Raises:
        ValueError, obstore.exceptions.BaseError: the object cannot be read.
    """
    folder, _, name = address.rpartition("/")
    return bytes(obstore.get(open_store(folder), name).bytes())


def open_bucket(address: str) -> BucketFolder:
    """Open the folder at an address such as `s3://bucket/prefix`.

    Raises:
        UserError: the address is incomplete, or the environment lacks what the bucket needs.
    """
    try:
        return BucketFolder(address)
    except (BaseError, ValueError) as error:
        raise UserError(f"{address}: no bucket that can be opened: {_reason(error)}") from error


class BucketFolder(Folder):
    """A prefix in a bucket. obstore retries transient errors: 500, 503 and lost connections."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.store = open_store(address)

    def where(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        try:
            with self._storage_errors(name, "read"):
                return bytes(obstore.get(self.store, name).bytes())
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        with self._storage_errors(name, "read"):
            size = obstore.head(self.store, name)["size"]
        return ranged_file(partial(self.read_range, name), size)

    def exists(self, name: str) -> bool:
        try:
            with self._storage_errors(name, "read"):
                obstore.head(self.store, name)
        except FileNotFoundError:
            return False
        return True

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a file, from `start` on."""
        with self._storage_errors(name, "read"):
            return bytes(obstore.get_range(self.store, name, start=start, length=length))

    def list(self, folder: str) -> dict[str, int]:
        with self._storage_errors(folder, "listed"):
            found = [(str(entry["path"]), entry["size"]) for page in obstore.list(self.store, folder) for entry in page]
        return dict(sorted(found))

    @contextmanager
    def whole_file(self, name: str) -> Iterator[BinaryIO]:
        try:
            with tempfile.TemporaryFile() as file:
                yield cast(BinaryIO, file)
                file.seek(0)
                obstore.put(self.store, name, file)
        except (BaseError, OSError) as error:
            raise self._error(name, "written", error) from error

    def create(self, name: str, content: bytes) -> bool:
        for _ in range(CREATE_ATTEMPTS):
            try:
                obstore.put(self.store, name, content, mode="create")
                return True
            except (BaseError, OSError) as error:
                failure = error
            # Another writer was first, or the answer to this request was lost: the content shows which.
            if (found := self.read(name)) is not None:
                return found == content
        raise self._error(name, "written", failure) from failure

    def probe(self, way_out: str = "take another output_dir") -> None:
        try:
            self.create(PROBE, b"")  # conditionally, as commits are created
        except StorageError as error:
            raise StorageError(f"{error}: {way_out}") from error
        with suppress(StorageError):  # an account may have the right to add but not to remove
            self.delete(PROBE)

    def free(self) -> int | None:
        return None

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._storage_errors(name, "removed"):
            obstore.delete(self.store, name)

    def move(self, name: str, to: str) -> bool:
        if self.exists(to):
            return False
        with self._storage_errors(name, "moved"):
            obstore.copy(self.store, name, to)
        self.delete(name)
        return True

    def leftovers(self, folder: str) -> dict[str, int]:
        return {}  # an unfinished upload is not an object

    def modified(self, name: str) -> float:
        with self._storage_errors(name, "read"):
            return obstore.head(self.store, name)["last_modified"].timestamp()

    @contextmanager
    def _storage_errors(self, name: str, done: str) -> Iterator[None]:
        """Turn obstore's errors into one line that names the file and what could not be `done` to it."""
        try:
            yield
        except BaseError as error:
            raise self._error(name, done, error) from error

    def _error(self, name: str, done: str, error: Exception) -> StorageError:
        return StorageError(f"{self.where(name)}: cannot be {done}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
