"""What a file system may lack, and what takes its place: locks, hard links, the sync of a file or a folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

# What systems answer that do not know a call: NFS without its lock server, Lustre, SMB, FAT, most that run as programs.
UNKNOWN = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY, errno.EBADF}
RENAME_NOREPLACE, HERE = 1, -100  # of linux/fs.h and fcntl.h


def lock(file: BinaryIO, operation: int) -> bool:
    """`flock` a file; False where its file system has no locks.

    Raises:
        BlockingIOError: another has it, and the operation does not wait.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        return False
    return True


def name_unless_taken(path: Path, name: Path) -> bool:
    """Give a file a name that nothing has yet, in one step; whether it keeps its old one too.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(path, name)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # no hard links here, or not for this user; where it is something else, the rename tells
        _rename_unless_taken(path, name)
        return False
    return True


def _rename_unless_taken(path: Path, name: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(HERE, os.fsencode(path), HERE, os.fsencode(name), RENAME_NOREPLACE) == 0:
            return
        if (number := ctypes.get_errno()) not in UNKNOWN:
            raise OSError(number, os.strerror(number), str(path), None, str(name))
    # Of two that come here at once the later one's file stays; of commits, that leaves the other's shard an orphan.
    if name.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name))
    path.rename(name)


def sync(file: BinaryIO) -> None:
    """Have a file's content on the disk, where the file system knows of that."""
    file.flush()
    _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the file system knows of that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written to, but not be listed
        return
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
