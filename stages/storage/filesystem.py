"""Locks, hard links and syncs, with substitutes for file systems that lack them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

# The errors of file systems without a call: NFS without its lock server, Lustre, SMB, FAT, most FUSE file systems.
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY, errno.EBADF}
RENAME_NOREPLACE, AT_FDCWD = 1, -100  # of linux/fs.h and fcntl.h


def lock(file: BinaryIO, operation: int) -> bool:
    """`flock` a file; return False if its file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and the operation does not wait.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def name_unless_taken(path: Path, name: Path) -> bool:
    """Give a file a new name in one step; return whether it keeps the old one too.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(path, name)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # no hard links, or not for this user; any other failure shows in the rename
        _rename_unless_taken(path, name)
        return False
    return True


def _rename_unless_taken(path: Path, name: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(name), RENAME_NOREPLACE) == 0:
            return
        if (number := ctypes.get_errno()) not in UNSUPPORTED:
            raise OSError(number, os.strerror(number), str(path), None, str(name))
    # Of two concurrent calls the later one's file stays. For commits, the other's shard becomes an orphan.
    if name.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name))
    path.rename(name)


def sync(file: BinaryIO) -> None:
    """Flush a file's content to the disk, if the file system supports it."""
    file.flush()
    _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, if the file system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may be writable but not readable
        return
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
