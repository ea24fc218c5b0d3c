"""The check of one shard, from its first byte to its last: is it as it was written, and are its samples valid?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from stages.records.schema import Commit, TensorSpec
from stages.records.shard import read_members, row_of
from stages.records.trajectory import from_members, schema_mismatch
from stages.storage.folder import READ_SIZE, Folder, unreadable

Member = tuple[str, int, bytes]


class BrokenError(Exception):
    """A shard is damaged; its arguments are what was expected and what was found."""


class _Hashed:
    """A file that is read once from its start, with the SHA-256 of the bytes read so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.digest.update(content)
        return content


def inspect_shard(root: Folder, commit: Commit, specs: dict[str, TensorSpec]) -> list[np.ndarray]:
    """Check a shard; return the timesteps `[k]` of each of its samples.

    Args:
        specs: dtype and shape of one record's tensors by name.

    Raises:
        StorageError: this user may not read the shard.
        BrokenError: its bytes are not as they were committed, or are not the samples of the commit.
    """
    problem, timesteps = None, []
    try:
        with root.open(commit.shard) as opened:
            file = _Hashed(opened)
            try:
                timesteps = list(_samples(file, commit, specs))  # type: ignore[arg-type]
            except BrokenError as broken:
                problem = broken
            while file.read(READ_SIZE):
                pass
    except FileNotFoundError as error:
        raise BrokenError("a shard", "no such file") from error
    except PermissionError as error:
        raise unreadable(root, commit.shard) from error
    except OSError as error:
        raise BrokenError("a shard", f"unreadable: {error.strerror or error}") from error
    if (found := file.digest.hexdigest()) != commit.sha256:
        raise BrokenError(f"SHA-256 {commit.sha256}", found)
    if problem is not None:
        raise problem
    return timesteps


def _samples(file: BinaryIO, commit: Commit, specs: dict[str, TensorSpec]) -> Iterator[np.ndarray]:
    members = read_members(file, commit.size)
    for row in commit.samples:
        metadata, tensors = (_next(members, f"{row['key']}.{suffix}") for suffix in ("json", "safetensors"))
        yield _timesteps(row, metadata, tensors, specs)
    _next(members, None)


def _next(members: Iterator[Member], name: str | None) -> Member:
    """Take the next member, which must have that name; with None, there must be no more."""
    expected = "the end of the shard" if name is None else name
    try:
        member = next(members, ("", 0, b""))
    except ValueError as error:
        raise BrokenError(expected, str(error)) from error
    if member[0] != (name or ""):
        raise BrokenError(expected, repr(member[0]) if member[0] else "the end of the shard")
    return member


def _timesteps(row: dict[str, Any], metadata: Member, tensors: Member, specs: dict[str, TensorSpec]) -> np.ndarray:
    key, (_, offset, content) = row["key"], tensors
    try:
        trajectory = from_members(content, metadata[2])
        named = trajectory.per_record() | {f"cond.{name}": value for name, value in trajectory.cond.items()}
        if found := schema_mismatch(named, specs):
            raise BrokenError(f"the tensors of {key}", found)
        found_row = {"key": trajectory.key, "offset": offset} | row_of(trajectory, content)
    except (ValueError, TypeError, AttributeError) as error:
        raise BrokenError(f"the sample {key}", " ".join(str(error).split())) from error
    for name, value in row.items():
        if found_row.get(name) != value:
            raise BrokenError(f"{name} {value} of {key}", str(found_row.get(name)))
    return trajectory.timestep.double().numpy()
