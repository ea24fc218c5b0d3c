"""How a dataset becomes one: a plan is described before its first shard, and published once all its units are committed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import UserError
from stages.records.commits import commit_name, damage_error
from stages.records.manifest import decode_manifest, encode_manifest, fingerprint, table_of
from stages.records.plans import (
    MANIFEST_FILE,
    OF_THE_PLAN,
    is_of_plan,
    manifest_copy,
    of_snapshot,
    plan_digests,
    published,
    write_info,
)
from stages.storage.files import sha256
from stages.storage.folder import Folder


def begin_plan(root: Folder, info: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Write into `dataset.json` what the dataset is meant to hold further, before its first shard; what is published stays.

    Args:
        info: the description so far, with no plan under way.
        plan: `units` and `trajectories`, those of this plan alone; `config`, `conditions`, `guidance`.

    Returns:
        The new description.
    """
    info = info | {"plans": [*info["plans"], plan]}
    if not published(info):
        info = of_snapshot(info, plan)
    write_info(root, info)
    return info


def withdraw(root: Folder, info: dict[str, Any]) -> dict[str, Any]:
    """Say in `dataset.json` that units of what was published are made again, so that nobody opens it before `publish`."""
    info = info | {"complete": False}
    write_info(root, info)
    return info


def publish(
    root: Folder, info: dict[str, Any], commits: Iterable[dict[str, Any]], again: bool = False
) -> dict[str, Any]:
    """Write the manifests and say in `dataset.json` that the dataset is whole, so that readers open it.

    Args:
        info: the description so far, with its `plans`.
        commits: of all their units, in order.
        again: publish only what was published before; a plan under way stays so.

    Returns:
        The new description.

    Raises:
        UserError: a commit is missing, or of another plan.
    """
    digests = plan_digests(info)
    rows, size = array("q", [0]), array("q", [0])  # up to each unit
    tensors: dict[str, Any] = {}

    def gone(unit: int) -> UserError:
        return UserError(f"{root.where(commit_name(unit))}: gone: generate again, which makes its unit anew")

    def counted() -> Iterator[dict[str, Any]]:
        for unit, commit in enumerate(commits):
            if commit["unit"] != unit:
                raise gone(unit)
            if not is_of_plan(commit, digests):
                problem = {"shard": commit_name(unit), "expected": OF_THE_PLAN, "found": "one of another"}
                raise damage_error(root, problem)
            rows.append(rows[-1] + len(commit["samples"]))
            size.append(size[-1] + commit["size"])
            tensors.update({} if tensors else commit["tensors"])
            yield commit

    whole = table_of(counted())
    plans: list[dict[str, Any]] = []
    units = 0
    under_way = info["plans"][len(published(info)) :] if again else []
    made = info["plans"][: len(info["plans"]) - len(under_way)]
    if len(rows) <= sum(plan["units"] for plan in made):
        raise gone(len(rows) - 1)
    for number, plan in enumerate(made, start=1):
        units += plan["units"]
        content, of_it = _publish_plan(root, number, plan, whole.slice(0, rows[units]))
        of_it["counts"] |= {"units": units, "bytes": size[units]}
        plans.append(plan | of_it)
    root.write(MANIFEST_FILE, content)
    common = {"complete": True, "plans": [*plans, *under_way], "tensors": tensors}
    info = of_snapshot(info | common, plans[-1])
    write_info(root, info)
    return info


def _publish_plan(root: Folder, number: int, plan: dict[str, Any], table: pa.Table) -> tuple[bytes, dict[str, Any]]:
    """Write the n-th plan's manifest, if it is not there; its bytes, and what `dataset.json` tells of it."""
    kept = _as_published(root, number, plan)
    before = None if kept is None else decode_manifest(kept)
    content = kept if kept is not None and table.equals(before) else encode_manifest(table)
    if root.read(name := manifest_copy(number)) != content:
        root.write(name, content)
    counts = {
        "trajectories": pc.count_distinct(table["trajectory"]).as_py(),
        "samples": len(table),
        "records": pc.sum(table["records"]).as_py(),
    }
    return content, {"counts": counts, "manifest_sha256": sha256(content), "fingerprint": fingerprint(table)}


def _as_published(root: Folder, number: int, plan: dict[str, Any]) -> bytes | None:
    """The manifest of the n-th plan, if it is there as it was published."""
    contents = (root.read(name) for name in (manifest_copy(number), MANIFEST_FILE))
    return next((content for content in contents if content and sha256(content) == plan.get("manifest_sha256")), None)
