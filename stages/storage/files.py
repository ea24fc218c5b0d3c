"""Atomic files on a disk: written to a temporary name, synced, and put in place by one system call."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stages.errors import StorageError
from stages.storage.filesystem import name_unless_taken, sync, sync_folder

TEMPORARY = ".*.????????.tmp"  # the names of `_temporary_file`
PROBE_SIZE = 4096  # bytes: a full disk still takes empty files


def whole_file(path: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file for writing. It appears at `path`, or replaces the old one, only if the block ends without an error.

    A device or pipe, such as `/dev/null`, is not replaced: the content goes into it.

    Raises:
        StorageError: the disk refused; an old file is unchanged.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        return _device(path)
    return _temporary_file(path, lambda temporary: temporary.replace(path))


def create(path: Path, content: bytes) -> bool:
    """Write a file unless `path` exists; return whether this call wrote it. Of concurrent calls, exactly one wins.

    Raises:
        StorageError: the disk refused.
    """
    won = False

    def put(temporary: Path) -> None:
        nonlocal won
        with suppress(FileExistsError):
            name_unless_taken(temporary, path)
            won = True

    with _temporary_file(path, put) as file:
        file.write(content)
    return won


def move(path: Path, to: Path) -> bool:
    """Rename a file within its file system; return False if the new name is taken.

    Raises:
        FileNotFoundError: the file does not exist.
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
def _temporary_file(path: Path, put_in_place: Callable[[Path], Any]) -> Iterator[BinaryIO]:
    """Open a file beside `path`; sync it and put it in place if the block ends without an error."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            sync(file)
        put_in_place(temporary)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed there"
        ) from error
    finally:
        with suppress(OSError):  # a read-only disk has been reported already
            temporary.unlink(missing_ok=True)


@contextmanager
def _device(device: Path) -> Iterator[BinaryIO]:
    """Collect the content, and write it into the device if the block ends without an error."""
    content = io.BytesIO()
    yield content
    try:
        device.write_bytes(content.getvalue())
    except OSError as error:
        raise StorageError(f"{device}: cannot be written: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Find out before any work is done that its result cannot be written to `path`.

    Raises:
        StorageError: it cannot.
    """
    if path.is_dir():
        raise StorageError(f"{path}: is a folder: name a file in it")
    if path.is_file() or not path.exists():  # otherwise a device or a pipe
        check_folder(path.parent, "name a file elsewhere")


def check_folder(folder: Path, way_out: str = "take another output_dir") -> None:
    """Find out before any work is done that a folder cannot be written to; make it if it does not exist.

    Raises:
        StorageError: it cannot be written to; the message ends with the way out.
    """
    probe = folder / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        make_folder(folder)
        with probe.open("wb") as file:
            file.write(bytes(PROBE_SIZE))
            sync(file)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}: {way_out}") from error
    except StorageError as error:
        raise StorageError(f"{error}: {way_out}") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(to_json(value))


def to_json(value: Any) -> bytes:
    """Encode `value` as indented JSON."""
    return (json.dumps(value, indent=2) + "\n").encode()


def make_folder(path: Path) -> None:
    """Make a folder and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be made: {error.strerror or error}") from error
