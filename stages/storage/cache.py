"""Whole shards on a local disk, so that an epoch fetches from a bucket only what is not there."""

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
from stages.storage.folder import READ_SIZE, Folder

LOCK, OURS = ".lock", re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.tmp")


class ShardCache:
    """At most `limit` bytes of shards in a folder, which processes and datasets may share.

    A shard is named by its SHA-256, fetched aside and put in place by a rename. Who reads or fetches a file holds a lock on
    it, of which a killed process lets go; what is locked is not removed.

    Raises:
        StorageError: the folder cannot be written to.
        UserError: its file system has no locks.
    """

    def __init__(self, root: Path, limit: int) -> None:
        make_folder(root)
        self.root, self.limit = root, limit
        with self._refusals(), self._counting():
            pass

    def open(self, source: Folder, name: str, sha256: str, size: int) -> BinaryIO:
        """A copy of a shard, fetched where there is none; the shard itself where it is of another size or there is no room.

        Raises:
            FileNotFoundError: there is no such shard.
            StorageError: it cannot be read there, or not be written here.
        """
        path = self.root / sha256
        while (kept := self._open(path, size)) is None:
            if not self._fetch(source, name, path, size):
                return source.open(name)
        return kept

    def _fetch(self, source: Folder, name: str, path: Path, size: int) -> bool:
        """False if it cannot be kept; after True, look again."""
        aside = path.with_name(f".{path.name}.tmp")
        with source.open(name) as original, self._refusals(), _locked(aside) as file:
            if not _is_at(file, aside):
                return True  # who held the lock has fetched it, or given up
            fetched = False
            try:
                if path.exists():
                    return True
                if original.seek(0, io.SEEK_END) == size and self._make_room(file, size):
                    original.seek(0)
                    shutil.copyfileobj(original, file, READ_SIZE)
                    sync(file)
                    fetched = file.tell() == size
            finally:
                with self._counting():
                    if fetched:
                        aside.replace(path)
                    else:
                        aside.unlink()
        return fetched

    def _make_room(self, file: BinaryIO, size: int) -> bool:
        """Give a file its size, which counts from then on; first the files that were read least lately go, if they must."""
        file.truncate(0)
        with self._counting():
            files = [(path, path.stat()) for path in self.root.iterdir() if OURS.fullmatch(path.name)]
            total = size + sum(stat.st_size for _, stat in files)
            for path, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
                if total > self.limit and _removed(path):
                    total -= stat.st_size
            if total <= self.limit:
                file.truncate(size)
        return total <= self.limit

    def _open(self, path: Path, size: int) -> BinaryIO | None:
        """A copy that is whole, marked as read now."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise StorageError(f"{path}: another user's, not to be read: name another cache_dir, or none") from error
        lock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_size == size and _is_at(file, path):
            with suppress(PermissionError):  # another user's: it counts as read when it was fetched
                os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
            return file
        with file, self._counting():
            if _is_at(file, path):
                path.unlink()
        return None

    def _counting(self) -> AbstractContextManager[BinaryIO]:
        """Within it, no other process puts a file in place, removes one, or makes room."""
        return _locked(self.root / LOCK)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.root}: cannot be written: {error.strerror or error}: name another cache_dir, or none"
            ) from error


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A file that no other process or thread holds meanwhile; made where there is none."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        if not lock(file, fcntl.LOCK_EX):
            way_out = "name one on a local disk, or none"
            raise UserError(f"cache_dir={path.parent}: its file system has no locks, which a cache needs: {way_out}")
        yield file


def _removed(path: Path) -> bool:
    with suppress(BlockingIOError, PermissionError), path.open("r+b") as file:  # as NFS asks of who locks for itself
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
