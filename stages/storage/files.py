"""Files that are whole or not there: written aside, synced, and put in place by one system call."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stages.errors import StorageError, UserError
from stages.storage.filesystem import lock, name_unless_taken, sync, sync_folder

SEAL = "checksum"
ASIDE = ".*.????????.tmp"  # the files of `_written_aside`
PROBED = 4096  # bytes: a disk that is full still takes names


def whole_file(path: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file for writing that appears at `path` only when the block ends well, replacing what was there.

    What is no file, such as `/dev/null`, is written into and stays what it is.

    Raises:
        StorageError: the disk refused; what was there is still there.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        return _written_into(path)
    return _written_aside(path, lambda aside: aside.replace(path))


def create(path: Path, content: bytes) -> bool:
    """Write `content` at `path` if nothing is there yet; False if something is. Never half a file, never two winners.

    Raises:
        StorageError: the disk refused.
    """
    won = False

    def put(aside: Path) -> None:
        nonlocal won
        with suppress(FileExistsError):
            name_unless_taken(aside, path)
            won = True

    with _written_aside(path, put) as file:
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
        has_both = name_unless_taken(path, to)
        sync_folder(to.parent)
        if has_both:
            path.unlink()
        sync_folder(path.parent)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be moved to {to}: {error.strerror or error}") from error
    return True


@contextmanager
def exclusive_lock(folder: Path, what: str) -> Iterator[None]:
    """Within it, no other process is alone in the folder; one that is killed lets go of it.

    Where the file system has no locks, it warns, and the folder is the user's care.

    Args:
        what: goes on there, for the message.

    Raises:
        UserError: another process is.
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


@contextmanager
def _written_aside(path: Path, put_in_place: Callable[[Path], Any]) -> Iterator[BinaryIO]:
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("w+b") as file:
            yield file
            sync(file)
        put_in_place(aside)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed there"
        ) from error
    finally:
        with suppress(OSError):  # a disk that can only be read has been told of
            aside.unlink(missing_ok=True)


@contextmanager
def _written_into(device: Path) -> Iterator[BinaryIO]:
    content = io.BytesIO()
    yield content
    try:
        device.write_bytes(content.getvalue())
    except OSError as error:
        raise StorageError(f"{device}: cannot be written: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Refuse to begin work whose result could not be written to a file.

    Raises:
        StorageError: it could not.
    """
    if path.is_dir():
        raise StorageError(f"{path}: is a folder: name a file in it")
    if path.is_file() or not path.exists():  # else it is a device
        check_folder(path.parent, "name a file elsewhere")


def check_folder(folder: Path, way_out: str = "take another output_dir") -> None:
    """Refuse to begin work whose results could not be written into a folder, which is made where there is none.

    Raises:
        StorageError: they could not; it ends with the way out.
    """
    probe = folder / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        make_folder(folder)
        with probe.open("wb") as file:
            file.write(bytes(PROBED))
            sync(file)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}: {way_out}") from error
    except StorageError as error:
        raise StorageError(f"{error}: {way_out}") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


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


def sha256(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
