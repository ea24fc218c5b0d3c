"""`dataset.json`: a dataset, plan by plan. Each published plan is a snapshot; at most one more plan is under way."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from stages.errors import UserError
from stages.records.schema import SCHEMA_VERSION, Commit, DatasetInfo, PublishedPlan
from stages.records.teacher import PLACE_OF_TEACHER
from stages.storage.fields import FieldError, read_fields
from stages.storage.folder import Folder, unreadable
from stages.storage.sealing import seal, sha256, unseal

DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
# The keys that decide what a plan's units hold.
DEFINING = (
    "units",
    "trajectories",
    "guidance",
    "conditions",
    "config",
)
PLANNED_UNIT = "a unit of the plan in dataset.json"


def read_info(root: Folder) -> DatasetInfo | None:
    """Read `dataset.json`; None if there is none.

    Raises:
        UserError: it is damaged, lacks a key, or is of another schema.
        StorageError: this user may not read it.
    """
    path = root.where(DATASET_FILE)
    try:
        content = root.read(DATASET_FILE)
        if content is None:
            return None
        version = int(json.loads(content)["schema_version"])
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema {version} is newer than {SCHEMA_VERSION}, the newest that this version reads: upgrade this "
                "project"
            )
        if version < SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema {version} is of an earlier version than {SCHEMA_VERSION}: generate the dataset anew, into "
                "another output_dir"
            )
        info = read_fields(DatasetInfo, unseal(content))
        if not info.plans:
            raise FieldError("no plans")
        return info
    except PermissionError as error:
        raise unreadable(root, DATASET_FILE) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = error if isinstance(error, FieldError) else "not as it was written"
        raise UserError(f"{path}: damaged: {found}; restore it, or generate into a new folder") from error


def write_info(root: Folder, info: DatasetInfo) -> None:
    """Write `dataset.json`."""
    root.write(DATASET_FILE, seal(info.to_json()))


def published(info: DatasetInfo | None) -> tuple[PublishedPlan, ...]:
    """Return the published plans, oldest first; none if there is no dataset."""
    return () if info is None else info.published


def plan_digests(info: DatasetInfo) -> list[tuple[int, str]]:
    """Return for each plan (the unit after its last, the SHA-256 of everything that decides what its units hold)."""
    defining: list[Any] = [_without_place(asdict(info.teacher))]
    digests, end = [], 0
    for plan in info.plans:
        entry = asdict(plan)
        config = plan.config | {"teacher": _without_place(plan.config["teacher"])}
        defining.append({key: entry[key] for key in DEFINING} | {"config": config})
        end += plan.units
        digests.append((end, sha256(json.dumps(defining, sort_keys=True).encode())))
    return digests


def _without_place(teacher: dict[str, Any]) -> dict[str, Any]:
    """Drop the path of a teacher from its facts: the fingerprint of its weights identifies it."""
    return {key: value for key, value in teacher.items() if key != PLACE_OF_TEACHER}


def digest_of_unit(digests: list[tuple[int, str]], unit: int) -> str | None:
    """Return the digest of the plan that a unit belongs to, from those of `plan_digests`; None beyond the last plan."""
    return next((digest for end, digest in digests if unit < end), None)


def matches_plan(commit: Commit, digests: list[tuple[int, str]]) -> bool:
    """Return whether the commit carries its plan's digest; a unit beyond all plans has no digest to compare with."""
    digest = digest_of_unit(digests, commit.unit)
    return digest is None or commit.plan == digest


def snapshots(root: Folder) -> list[str]:
    """Return the fingerprints of all snapshots, oldest first."""
    return [plan.fingerprint for plan in published(read_info(root))]


def manifest_copy(number: int) -> str:
    """Return the file name of the n-th snapshot's own manifest."""
    return f"manifests/{number}.parquet"


def manifest_name(info: DatasetInfo, number: int) -> str:
    """Return the file of the n-th snapshot's manifest. While the dataset grows, `manifest.parquet` may be replaced."""
    return MANIFEST_FILE if number == len(info.plans) else manifest_copy(number)
