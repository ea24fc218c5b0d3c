"""The life of a plan: it is described before its first shard, and published once all its units are committed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import UserError
from stages.records.commits import commit_name, damage_error
from stages.records.manifest import decode_manifest, encode_manifest, fingerprint, table_of
from stages.records.plans import (
    MANIFEST_FILE,
    PLANNED_UNIT,
    manifest_copy,
    matches_plan,
    plan_digests,
    write_info,
)
from stages.records.schema import Commit, Counts, DatasetInfo, PlanEntry, PublishedPlan, SizeFacts
from stages.storage.folder import Folder
from stages.storage.sealing import sha256


def begin_plan(root: Folder, info: DatasetInfo, plan: PlanEntry) -> DatasetInfo:
    """Add a plan to `dataset.json`, before its first shard; the published plans stay.

    Args:
        info: the content so far, with no plan under way.

    Returns:
        The new content.
    """
    info = replace(info, plans=(*info.plans, plan))
    write_info(root, info)
    return info


def withdraw(root: Folder, info: DatasetInfo) -> DatasetInfo:
    """Mark a dataset as incomplete while published units are made again; no reader opens it until `publish`."""
    info = replace(info, complete=False)
    write_info(root, info)
    return info


def publish(root: Folder, info: DatasetInfo, commits: Iterable[Commit], again: bool = False) -> DatasetInfo:
    """Write the manifests and mark the dataset as complete, so that readers open it.

    Args:
        info: the content of `dataset.json` so far.
        commits: of all units of its plans, in order.
        again: publish the published plans again; a plan under way stays under way.

    Returns:
        The new content.

    Raises:
        UserError: a commit is missing.
        DamageError: a commit is of another plan.
    """
    digests = plan_digests(info)
    rows, size = array("q", [0]), array("q", [0])  # totals up to each unit
    sizes: dict[str, SizeFacts] = {}

    def missing(unit: int) -> UserError:
        return UserError(f"{root.where(commit_name(unit))}: gone: generate again to make its unit anew")

    def counted() -> Iterator[Commit]:
        for unit, commit in enumerate(commits):
            if commit.unit != unit:
                raise missing(unit)
            if not matches_plan(commit, digests):
                problem = {"shard": commit_name(unit), "expected": PLANNED_UNIT, "found": "one of another"}
                raise damage_error(root, problem)
            rows.append(rows[-1] + len(commit.samples))
            size.append(size[-1] + commit.size)
            sizes.setdefault(commit.size_name, SizeFacts(commit.tensors, commit.constants, commit.decoder_input))
            yield commit

    whole = table_of(counted())
    made = info.published if again else info.plans
    if len(rows) <= sum(plan.units for plan in made):
        raise missing(len(rows) - 1)
    plans: list[PublishedPlan] = []
    units = 0
    for number, plan in enumerate(made, start=1):
        units += plan.units
        content, published = _publish_plan(root, number, plan, whole.slice(0, rows[units]), units, size[units])
        plans.append(published)
    root.write(MANIFEST_FILE, content)
    info = replace(info, complete=True, plans=(*plans, *info.plans[len(made) :]), sizes=sizes)
    write_info(root, info)
    return info


def _publish_plan(
    root: Folder, number: int, plan: PlanEntry, table: pa.Table, units: int, size: int
) -> tuple[bytes, PublishedPlan]:
    """Write the n-th plan's manifest unless it is there; return its bytes and the plan's entry.

    Args:
        table: the rows of the snapshot.
        units: of the snapshot.
        size: of its shards, in bytes.
    """
    old = _as_published(root, number, plan)
    content = old if old is not None and table.equals(decode_manifest(old)) else encode_manifest(table)
    if root.read(name := manifest_copy(number)) != content:
        root.write(name, content)
    counts = Counts(
        trajectories=pc.count_distinct(table["trajectory"]).as_py(),
        samples=len(table),
        records=pc.sum(table["records"]).as_py(),
        units=units,
        bytes=size,
    )
    entry = vars(plan) | {"counts": counts, "manifest_sha256": sha256(content), "fingerprint": fingerprint(table)}
    return content, PublishedPlan(**entry)


def _as_published(root: Folder, number: int, plan: PlanEntry) -> bytes | None:
    """Return the published manifest of the n-th plan, if a file still holds it."""
    if not isinstance(plan, PublishedPlan):
        return None
    contents = (root.read(name) for name in (manifest_copy(number), MANIFEST_FILE))
    return next((content for content in contents if content and sha256(content) == plan.manifest_sha256), None)
