"""A cache of whole shards on a local disk, so that each shard of a bucket or a hub is fetched once."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stages.errors import StorageError, UserError
from stages.storage.files import make_folder
from stages.storage.filesystem import lock, sync
from stages.storage.folder import Folder

FETCH_SIZE = 1 << 26  # bytes of a request; one to a hub takes two round trips
LOCK, CACHE_FILE = ".lock", re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.tmp")


class ShardCache:
    """At most `limit` bytes of shards in a folder that processes and datasets may share.

    A shard is named by its SHA-256, fetched into a temporary file and put in place by a rename. A process that reads or
    fetches a file holds a lock on it; the kernel releases it if the process is killed. A locked file is not removed.

    Raises:
        StorageError: the folder cannot be written to.
        UserError: its file system has no locks.
    """

    def __init__(self, root: Path, limit: int) -> None:
        make_folder(root)
        self.root, self.limit = root, limit
        with self._write_errors(), self._exclusive():
            pass

    def open(self, source: Folder, name: str, sha256: str, size: int) -> BinaryIO:
        """Open the copy of a shard, fetched if necessary; open the shard itself if its size is wrong or room is
        lacking.

        Args:
            size: of the shard, in bytes.

        Raises:
            FileNotFoundError: there is no such shard.
            StorageError: the shard cannot be read, or its copy cannot be written.
        """
        path = self.root / sha256
        while (copy := self._open(path, size)) is None:
            if not self._fetch(source, name, path, size):
                return source.open(name)
        return copy

    def _fetch(self, source: Folder, name: str, path: Path, size: int) -> bool:
        """Fetch a shard; return False if it cannot be cached. After True, look for the copy again."""
        temporary = path.with_name(f".{path.name}.tmp")
        with source.open(name) as original, self._write_errors(), _locked(temporary) as file:
            if not _is_at(file, temporary):
                return True  # the process that held the lock has fetched it, or given up
            fetched = False
            try:
                if path.exists():
                    return True
                if original.seek(0, io.SEEK_END) == size and self._make_room(file, size):
                    original.seek(0)
                    shutil.copyfileobj(original, file, FETCH_SIZE)
                    sync(file)
                    fetched = file.tell() == size
            finally:
                with self._exclusive():
                    if fetched:
                        temporary.replace(path)
                    else:
                        temporary.unlink()
        return fetched

    def _make_room(self, file: BinaryIO, size: int) -> bool:
        """Remove the least recently read files if necessary, then reserve `size` bytes; return whether they fit."""
        file.truncate(0)
        with self._exclusive():
            files = [(path, path.stat()) for path in self.root.iterdir() if CACHE_FILE.fullmatch(path.name)]
            total = size + sum(stat.st_size for _, stat in files)
            for path, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
                if total > self.limit and _removed(path):
                    total -= stat.st_size
            if total <= self.limit:
                file.truncate(size)
        return total <= self.limit

    def _open(self, path: Path, size: int) -> BinaryIO | None:
        """Open a copy and mark it as read now; remove a damaged one. None if there is no whole copy."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise StorageError(
                f"{path}: belongs to another user and cannot be read: name another cache_dir, or none"
            ) from error
        lock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_size == size and _is_at(file, path):
            with suppress(PermissionError):  # of another user: it counts as read when it was fetched
                os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
            return file
        with file, self._exclusive():
            if _is_at(file, path):
                path.unlink()
        return None

    def _exclusive(self) -> AbstractContextManager[BinaryIO]:
        """Exclude other processes that put files in place, remove them, or make room."""
        return _locked(self.root / LOCK)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn the disk's errors into a `StorageError` with a way out."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.root}: cannot be written: {error.strerror or error}: name another cache_dir, or none"
            ) from error


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file, made if it does not exist, and hold its lock within the block."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        if not lock(file, fcntl.LOCK_EX):
            way_out = "name one on a local disk, or none"
            raise UserError(f"cache_dir={path.parent}: its file system has no locks, which a cache needs: {way_out}")
        yield file


def _removed(path: Path) -> bool:
    """Remove a file unless it is locked; return whether it was removed."""
    # NFS grants an exclusive lock only on a writable file.
    with (
        suppress(BlockingIOError, PermissionError),
        path.open("r+b") as file,
    ):
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
