"""A lock on a folder for one process at a time."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import StorageError, UserError
from stages.storage.files import make_folder
from stages.storage.filesystem import lock


@contextmanager
def exclusive_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder within the block; the kernel releases it if the process is killed.

    If the file system has no locks, warn and go on without one.

    Args:
        what: the reason for the message, such as "another run is training".

    Raises:
        UserError: another process holds the lock.
        StorageError: the disk refused.
    """
    make_folder(folder)
    try:
        file = (folder / ".lock").open("wb")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            locked = lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{folder}: {what} here: wait for it, or take another output_dir"
            raise UserError(message) from error
        if not locked:
            message = "its file system has no locks: goes on without, so begin no second run there meanwhile"
            warnings.warn(f"{folder}: {message}", stacklevel=2)
        yield
