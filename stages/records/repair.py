"""Mends a dataset: damage is set aside, so that generation makes those units again; manifests are written again; orphans go.

A unit's commit record goes first, because without it nobody takes the unit for whole. A kill at any moment leaves what the
next repair, or the next run of generation, goes on from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count

from stages.records.commits import commit_name, is_committed
from stages.records.manifest import unit_of
from stages.records.plans import published, read_info
from stages.records.publication import publish
from stages.records.verification import Problem, Survey, is_named, unit_of_file
from stages.storage.folder import Folder

QUARANTINE = "quarantine"
Repair = dict[str, str]  # a problem, and what was `done` about it


def repair(found: Survey, grace: float) -> list[Repair]:
    """Mend what a survey found; tells what was done.

    Args:
        grace: seconds that an orphan must be old to be removed.

    Raises:
        StorageError: the place refused; what was done before stays done.
    """
    return [
        *_set_commits_aside(found),
        *_set_shards_aside(found),
        *_publish_again(found),
        *_remove_orphans(found, grace),
    ]


def _set_commits_aside(found: Survey) -> Iterator[Repair]:
    """Damaged commit records and those of no plan, then the shards that they may have named."""
    named = {commit["shard"] for commit in found.commits.values()}
    for name, problem in found.of_commits.items():
        yield from _set_aside(found.root, name, problem)
        for shard in found.sizes:
            if shard not in named and unit_of_file(shard) == unit_of(name) and not is_named(found.root, shard):
                left = {"shard": shard, "expected": f"the commit record {name}", "found": problem["found"]}
                yield from _set_aside(found.root, shard, left)


def _set_shards_aside(found: Survey) -> Iterator[Repair]:
    """Damaged shards, each after its commit record."""
    for unit, problem in sorted(found.of_shards.items()):
        shard = found.commits[unit]["shard"]
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
    """Manifests that are damaged, stale or missing, where every unit that they are of is whole."""
    whole = [unit for unit in found.units if unit in found.commits and unit not in found.of_shards]
    wrong = [*found.of_manifests, *found.unfinished, *found.differences]
    if not wrong or not published(found.info) or len(whole) < len(found.units):
        return
    if found.differences and not found.deep:
        return  # the commit may be the one that is wrong, which its shard tells
    there = read_info(found.root)
    if there is None or there["plans"] != found.info["plans"]:
        return  # generation has gone on meanwhile
    publish(found.root, found.info, (found.commits[unit] for unit in whole), again=True)
    for problem in wrong:
        yield problem | {"done": "manifests written again from the commits"}


def _remove_orphans(found: Survey, grace: float) -> Iterator[Repair]:
    """Those older than `grace`, unless an attempt that is still under way could commit them: no clock tells that.

    An attempt at a unit that is committed can only lose.
    """
    if not found.orphans:
        return
    now, planned = found.root.now(), range(sum(plan["units"] for plan in found.info["plans"]))
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
