"""Files that are whole or not there: written aside, synced, and put in place by one system call."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stages.errors import StorageError, UserError

SEAL = "checksum"
ASIDE = ".*.????????.tmp"  # the files of `_written_aside`


def whole_file(path: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file for writing that appears at `path` only when the block ends well, replacing what was there.

    Raises:
        StorageError: the disk refused; what was there is still there.
    """
    return _written_aside(path, lambda aside: aside.replace(path))


def create(path: Path, content: bytes) -> bool:
    """Write `content` at `path` if nothing is there yet; False if something is. Never half a file, never two winners.

    Raises:
        StorageError: the disk refused.
    """
    won = False

    def link(aside: Path) -> None:
        nonlocal won
        with suppress(FileExistsError):
            os.link(aside, path)
            won = True

    with _written_aside(path, link) as file:
        file.write(content)
    return won


def move(path: Path, to: Path) -> bool:
    """Give a file another name in the same file system; False if that is taken.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the disk refused.
    """
    make_folder(to.parent)
    try:
        os.link(path, to)  # a rename would replace what is there
        _sync_folder(to.parent)
        path.unlink()
        _sync_folder(path.parent)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be moved to {to}: {error.strerror or error}") from error
    return True


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Within it, no other process is alone in the folder; one that is killed lets go of it.

    Args:
        what: goes on there, for the message.

    Raises:
        UserError: another process is.
    """
    make_folder(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = f"{folder}: {what} here: wait for it, or take another output_dir"
            raise UserError(told) from error
        yield


@contextmanager
def _written_aside(path: Path, put_in_place: Callable[[Path], Any]) -> Iterator[BinaryIO]:
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(aside)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed there"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(to_json(value))


def to_json(value: Any) -> bytes:
    """Readable JSON."""
    return (json.dumps(value, indent=2) + "\n").encode()


def seal(value: dict[str, Any]) -> bytes:
    """Readable JSON that carries the checksum of the rest of itself."""
    return to_json(value | {SEAL: _digest(value)})


def unseal(content: bytes) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
        ValueError: the content is not as it was written.
    """
    value = json.loads(content)
    if not isinstance(value, dict) or value.pop(SEAL, None) != _digest(value):
        raise ValueError("not as it was written")
    return value


def _digest(value: dict[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def make_folder(path: Path) -> None:
    """Make a folder and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be made: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
