"""Commit records. A shard counts once its unit has one, and the first attempt to create it wins."""

from __future__ import annotations

import io
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from typing import Any

from stages.errors import DamageError
from stages.records.manifest import unit_of
from stages.records.schema import Commit
from stages.records.shard import Sample, hash_file, write_shard
from stages.storage.fields import read_fields
from stages.storage.folder import Folder, unreadable
from stages.storage.sealing import seal, unseal

COMMITS_AT_ONCE = 1024
READERS = 16  # threads: a request to a bucket mostly waits
COMMITS_PER_READER = COMMITS_AT_ONCE // READERS  # handing over single commits takes longer than reading them


def commit_unit(
    root: Folder,
    unit: int,
    samples: Iterable[Sample],
    plan: str,
    constants: dict[str, Any] | None = None,
    decoder_input: list[int] | None = None,
) -> Commit:
    """Write a unit's shard and commit it; return the commit record that won, of this attempt or an earlier one.

    Args:
        plan: digest of the unit's plan, from `plan_digests`.
        constants, decoder_input: see `Commit`.
    """
    shard = f"shards/{unit:05d}-{uuid.uuid4().hex[:8]}.tar"
    record = commit_name(unit)
    samples = list(samples)
    with root.whole_file(shard) as file:
        rows = write_shard(file, samples)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        digest = hash_file(file)
    commit = Commit(unit, plan, shard, size, digest, samples[0].tensors, rows, constants or {}, decoder_input)
    if not root.create(record, seal(asdict(commit))):
        root.delete(shard)
    return read_commit(root, record)


def commit_names(root: Folder) -> list[str]:
    """Return the file names of all commit records, in the order of the units."""
    numbered = [name for name in root.list("commits") if re.fullmatch(r"commits/\d+\.json", name)]
    return sorted((name for name in numbered if name == commit_name(unit_of(name))), key=unit_of)


def read_commit(root: Folder, name: str) -> Commit:
    """Read a commit record.

    Raises:
        DamageError: it is not as it was written, or lacks a key.
        StorageError: this user may not read it.
    """
    try:
        commit = read_fields(Commit, unseal(root.read(name) or b""))
        if commit.unit != unit_of(name) or not re.fullmatch(rf"shards/0*{unit_of(name)}-\w+\.tar", commit.shard):
            raise ValueError("of another unit")
    except PermissionError as error:
        raise unreadable(root, name) from error
    except (OSError, ValueError) as error:
        raise DamageError(
            f"{root.where(name)}: damaged: `python -m pipeline.verify {root.override('data_dir')} repair=true` sets it "
            "aside; then generate again to make its unit anew"
        ) from error
    return commit


def committed_units(root: Folder) -> list[int]:
    """Return the units that have a commit record, in order, without reading the records."""
    return [unit_of(name) for name in commit_names(root)]


def is_committed(root: Folder, unit: int) -> bool:
    """Return whether a unit has a commit record."""
    return root.exists(commit_name(unit))


def commit_name(unit: int) -> str:
    """Return the file name of a unit's commit record."""
    return f"commits/{unit:05d}.json"


def read_commits(root: Folder) -> Iterator[Commit]:
    """Read every commit record, in the order of the units; few of them are in memory at once.

    Raises:
        DamageError: a record is not as it was written, or lacks a key.
        StorageError: this user may not read one.
    """

    def read(units: list[int]) -> list[Commit]:
        return [read_commit(root, commit_name(unit)) for unit in units]

    units = committed_units(root)
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(units), COMMITS_AT_ONCE):
            batch = units[start : start + COMMITS_AT_ONCE]
            parts = [batch[i : i + COMMITS_PER_READER] for i in range(0, len(batch), COMMITS_PER_READER)]
            yield from chain.from_iterable(threads.map(read, parts))


def damage_error(root: Folder, problem: dict[str, str]) -> DamageError:
    """Return the error for a problem; it says how to find all problems."""
    return DamageError(
        f"{root.where(problem['shard'])}: damaged: expected {problem['expected']}, found {problem['found']}: "
        f"`python -m pipeline.verify {root.override('data_dir')}` lists all damage"
    )
