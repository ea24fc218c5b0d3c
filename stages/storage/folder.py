"""Where a dataset is: a folder on disk, or a prefix in a bucket, with the same guarantees."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import obstore
from obstore.exceptions import BaseError

from stages.errors import StorageError, UserError
from stages.storage.buckets import SCHEMES, open_store
from stages.storage.files import ASIDE, check_folder, create, move, whole_file

READ_SIZE = 1 << 22
CREATE_ATTEMPTS = 3
CLOCK, PROBE = ".now", ".probe"


def open_folder(address: str | Path) -> Folder:
    """The folder at a local path, or at `s3://bucket/prefix`, `gs://...`, `az://...`; it need not exist yet.

    Raises:
        UserError: there is no such kind of place, or the environment tells too little of it.
    """
    address = str(address)
    if "://" not in address:
        return DiskFolder(address)
    if not address.startswith(SCHEMES):
        raise UserError(f"{address}: neither a local folder nor one of {', '.join(SCHEMES)}")
    try:
        return BucketFolder(address)
    except (BaseError, ValueError) as error:
        raise UserError(f"{address}: no bucket that can be opened: {_reason(error)}") from error


def absolute(address: str) -> str:
    """The same place, named so that another process finds it."""
    return address if "://" in address else str(Path(address).resolve())


class Folder(ABC):
    """Files by name, such as `shards/00000-1a2b3c4d.tar`; each is whole or not there. As a string, its address as it was given.

    Raises:
        StorageError: in every method: a bucket refused, or a disk that was to be written to.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def __str__(self) -> str:
        return self.address

    def override(self, key: str) -> str:
        """`KEY=ADDRESS` for a command line."""
        return shlex.quote(f"{key}={self}")

    @abstractmethod
    def where(self, name: str) -> str:
        """The address of a file."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file to read parts of.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, int]:
        """The files directly in a folder: their names, in order, and sizes."""

    @abstractmethod
    def whole_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing that appears only when the block ends well, replacing what was there."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing what was there."""
        with self.whole_file(name) as file:
            file.write(content)

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a file if none is there yet; False if another one is. Of many at once, one wins."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def move(self, name: str, to: str) -> bool:
        """Give a file another name; False if that is taken. Killed half way, it is there under both.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def leftovers(self, folder: str) -> dict[str, int]:
        """The files directly in a folder that were written aside and are not in place: their names and sizes."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file was last written, in seconds by the clock of the place.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def probe(self, way_out: str = "take another output_dir") -> None:
        """Refuse a place that cannot be written to before there is work to lose: makes a file, and removes it.

        Raises:
            StorageError: it cannot; it ends with the way out.
        """

    @abstractmethod
    def free(self) -> int | None:
        """Bytes that there is room for, or None where nobody knows."""

    def now(self) -> float:
        """The time by the same clock, which need not be this machine's."""
        self.write(CLOCK, b"")
        try:
            return self.modified(CLOCK)
        finally:
            self.delete(CLOCK)


class DiskFolder(Folder):
    """A folder on a disk that all who use it see."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.path = Path(address)

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def list(self, folder: str) -> dict[str, int]:
        sizes = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # an attempt that lost took its shard away meanwhile
                    if not entry.name.startswith("."):
                        sizes[f"{folder}/{entry.name}"] = entry.stat().st_size
        return dict(sorted(sizes.items()))

    def whole_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        return whole_file(self.path / name)

    def create(self, name: str, content: bytes) -> bool:
        return create(self.path / name, content)

    def probe(self, way_out: str = "take another output_dir") -> None:
        check_folder(self.path, way_out)

    def free(self) -> int | None:
        return shutil.disk_usage(self.path).free

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> bool:
        return move(self.path / name, self.path / to)

    def leftovers(self, folder: str) -> dict[str, int]:
        sizes = {}
        for path in sorted((self.path / folder).glob(ASIDE)):
            with suppress(FileNotFoundError):  # put in place meanwhile
                sizes[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return sizes

    def modified(self, name: str) -> float:
        return (self.path / name).stat().st_mtime


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


def unreadable(root: Folder, name: str) -> StorageError:
    """A file that is another user's is not damaged: nothing is to be skipped, and nothing set aside."""
    return StorageError(
        f"{root.where(name)}: may not be read by this user: let its owner run `chmod -R a+rX` on the dataset"
    )


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
