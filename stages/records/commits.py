"""Commit records: a shard counts once it has one, and the first attempt at a unit to make one wins."""

from __future__ import annotations

import io
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from stages.errors import DamageError
from stages.records.manifest import unit_of
from stages.records.shard import Sample, hash_file, write_shard
from stages.storage.files import seal, unseal
from stages.storage.folder import Folder, unreadable

COMMITS_AT_ONCE = 1024
READERS = 16  # a request to a bucket mostly waits
COMMITS_OF_A_READER = COMMITS_AT_ONCE // READERS  # to pass them on one by one takes longer than to read them


def commit_unit(root: Folder, unit: int, samples: Iterable[Sample], plan: str | None = None) -> dict[str, Any]:
    """Write a unit's shard and commit it; returns the commit record that won, be it this attempt's or an earlier one's.

    Args:
        plan: the digest of the unit's plan, as `plan_digests` has it.
    """
    shard = f"shards/{unit:05d}-{uuid.uuid4().hex[:8]}.tar"
    record = commit_name(unit)
    samples = list(samples)
    with root.whole_file(shard) as file:
        rows = write_shard(file, samples)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        digest = hash_file(file)
    tensors = samples[0].tensors
    commit = {
        "unit": unit, "plan": plan, "shard": shard, "size": size, "sha256": digest, "tensors": tensors, "samples": rows,
    }  # fmt: skip
    if not root.create(record, seal(commit)):
        root.delete(shard)
    return read_commit(root, record)


def commit_names(root: Folder) -> list[str]:
    """The files of all commit records, in the order of the plan, in which five digits come before six."""
    numbered = [name for name in root.list("commits") if re.fullmatch(r"commits/\d+\.json", name)]
    return sorted((name for name in numbered if name == commit_name(unit_of(name))), key=unit_of)


def read_commit(root: Folder, name: str) -> dict[str, Any]:
    """One commit record.

    Raises:
        UserError: it is not as it was written, or this user may not read it.
    """
    try:
        commit = unseal(root.read(name) or b"")
        if commit["unit"] != unit_of(name) or not re.fullmatch(rf"shards/0*{unit_of(name)}-\w+\.tar", commit["shard"]):
            raise ValueError("of another unit")
    except PermissionError as error:
        raise unreadable(root, name) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{root.where(name)}: damaged: `python -m pipeline.verify {root.override('data_dir')} repair=true` sets it aside; "
            "then generate again, which makes its unit anew"
        ) from error
    return commit


def committed_units(root: Folder) -> list[int]:
    """The units that have a commit record, in the order of the plan; none is read."""
    return [unit_of(name) for name in commit_names(root)]


def is_committed(root: Folder, unit: int) -> bool:
    """Whether a unit has a commit record by now."""
    return root.exists(commit_name(unit))


def commit_name(unit: int) -> str:
    """The file of a unit's commit record."""
    return f"commits/{unit:05d}.json"


def read_commits(root: Folder) -> Iterator[dict[str, Any]]:
    """Every commit record, in the order of the plan; few of them are in memory at once.

    Raises:
        UserError: one is not as it was written.
    """

    def read(units: list[int]) -> list[dict[str, Any]]:
        return [read_commit(root, commit_name(unit)) for unit in units]

    units = committed_units(root)
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(units), COMMITS_AT_ONCE):
            some = units[start : start + COMMITS_AT_ONCE]
            parts = [some[i : i + COMMITS_OF_A_READER] for i in range(0, len(some), COMMITS_OF_A_READER)]
            yield from chain.from_iterable(threads.map(read, parts))


def damage_error(root: Folder, problem: dict[str, str]) -> DamageError:
    """A problem, and how to find all there are."""
    return DamageError(
        f"{root.where(problem['shard'])}: damaged: expected {problem['expected']}, found {problem['found']}: "
        f"`python -m pipeline.verify {root.override('data_dir')}` lists all damage"
    )
