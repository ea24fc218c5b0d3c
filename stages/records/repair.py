"""The repair of a dataset: set damage aside, so that generation makes the units again, and rewrite manifests.

A unit's commit record is moved before its shard, because without a record the unit is missing to everyone. After a kill
at any moment, the next repair or the next run of generation continues. Old orphans are removed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count

from stages.records.commits import commit_name, is_committed
from stages.records.manifest import unit_of
from stages.records.plans import read_info
from stages.records.publication import publish
from stages.records.verification import Problem, Survey, is_named, unit_of_file
from stages.storage.folder import Folder

QUARANTINE = "quarantine"
Repair = dict[str, str]  # a problem, with what was `done`


def repair(found: Survey, grace: float) -> list[Repair]:
    """Repair what a survey found; return what was done.

    Args:
        grace: age in seconds from which an orphan is removed.

    Raises:
        StorageError: the storage refused; the steps before it stay done.
    """
    return [
        *_set_commits_aside(found),
        *_set_shards_aside(found),
        *_publish_again(found),
        *_remove_orphans(found, grace),
    ]


def _set_commits_aside(found: Survey) -> Iterator[Repair]:
    """Move damaged commit records and those of no plan, then the shards that they may have named."""
    named = {commit.shard for commit in found.commits.values()}
    for name, problem in found.commit_problems.items():
        yield from _set_aside(found.root, name, problem)
        for shard in found.sizes:
            if shard not in named and unit_of_file(shard) == unit_of(name) and not is_named(found.root, shard):
                left = {"shard": shard, "expected": f"the commit record {name}", "found": problem["found"]}
                yield from _set_aside(found.root, shard, left)


def _set_shards_aside(found: Survey) -> Iterator[Repair]:
    """Move damaged shards, each after its commit record."""
    for unit, problem in sorted(found.shard_problems.items()):
        shard = found.commits[unit].shard
        yield from _set_aside(found.root, commit_name(unit), problem | {"shard": commit_name(unit)})
        if shard in found.sizes:
            yield from _set_aside(found.root, shard, problem)


def _set_aside(root: Folder, name: str, problem: Problem) -> Iterator[Repair]:
    for number in count():
        to = f"{QUARANTINE}/{name}" + (f".{number}" if number else "")
        with suppress(FileNotFoundError):
            if not root.move(name, to):
                continue
            yield problem | {"done": f"moved to {to}"}
        return


def _publish_again(found: Survey) -> Iterator[Repair]:
    """Rewrite manifests that are damaged, stale or missing, if every unit of theirs is whole."""
    whole = [unit for unit in found.units if unit in found.commits and unit not in found.shard_problems]
    wrong = [*found.manifest_problems, *found.unfinished, *found.differences]
    if not wrong or not found.info.published or len(whole) < len(found.units):
        return
    if found.differences and not found.deep:
        return  # the commit itself may be wrong, which only its shard shows
    info = read_info(found.root)
    if info is None or info.plans != found.info.plans:
        return  # generation has continued since the survey
    publish(found.root, found.info, (found.commits[unit] for unit in whole), again=True)
    for problem in wrong:
        yield problem | {"done": "manifests written again from the commits"}


def _remove_orphans(found: Survey, grace: float) -> Iterator[Repair]:
    """Remove orphans older than `grace`, except those that an attempt under way could still commit, however old.

    An attempt at a committed unit can only lose, so its orphans go.
    """
    if not found.orphans:
        return
    now, planned = found.root.now(), range(sum(plan.units for plan in found.info.plans))
    for name, size in found.orphans.items():
        unit = unit_of_file(name)
        if unit is not None and unit in planned and not is_committed(found.root, unit):
            continue
        with suppress(FileNotFoundError):
            age = now - found.root.modified(name)
            if age >= grace and not is_named(found.root, name):
                found.root.delete(name)
                problem = {"shard": name, "expected": "a commit record that names it", "found": "none"}
                yield problem | {"done": f"removed: {size:,} bytes, {age:,.0f} seconds old"}
