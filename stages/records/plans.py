"""`dataset.json`: what a dataset is, plan by plan. Each plan that is made to its end is a snapshot; at most one more is under way."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from stages.errors import UserError
from stages.records.fields import FieldError, read_fields
from stages.records.schema import SCHEMA_VERSION, Commit, DatasetInfo, PublishedPlan
from stages.records.teacher import PLACE_OF_TEACHER
from stages.storage.folder import Folder, unreadable
from stages.storage.sealing import seal, sha256, unseal

DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
DEFINING = ("units", "trajectories", "guidance", "conditions", "config")  # of a plan: what decides what it makes
OF_THE_PLAN = "a unit of the plan in dataset.json"


def read_info(root: Folder) -> DatasetInfo | None:
    """The content of `dataset.json`, or None where there is none.

    Raises:
        UserError: it is not readable, or of another schema than this version knows.
    """
    path = root.where(DATASET_FILE)
    try:
        content = root.read(DATASET_FILE)
        if content is None:
            return None
        version = int(json.loads(content)["schema_version"])
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema {version} is newer than {SCHEMA_VERSION}, the newest known here: upgrade this project"
            )
        if version < SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema {version} is of an earlier version than {SCHEMA_VERSION}: generate the dataset anew, into another "
                "output_dir"
            )
        return read_fields(DatasetInfo, unseal(content))
    except PermissionError as error:
        raise unreadable(root, DATASET_FILE) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = error if isinstance(error, FieldError) else "not as it was written"
        raise UserError(f"{path}: damaged: {found}; restore it, or generate into a new folder") from error


def write_info(root: Folder, info: DatasetInfo) -> None:
    """Write `dataset.json`."""
    root.write(DATASET_FILE, seal(info.to_json()))


def published(info: DatasetInfo | None) -> tuple[PublishedPlan, ...]:
    """The published plans, oldest first; none where there is no dataset."""
    return () if info is None else info.published


def plan_digests(info: DatasetInfo) -> list[tuple[int, str]]:
    """For each plan the unit after its last, and the SHA-256 of all that decides what its units hold."""
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
    """The facts of a teacher without the place where it was found: its weights tell which it is."""
    return {key: value for key, value in teacher.items() if key != PLACE_OF_TEACHER}


def is_of_plan(commit: Commit, digests: list[tuple[int, str]]) -> bool:
    """Whether a commit carries the digest of its unit's plan; a unit beyond all plans has none to compare with."""
    digest = next((digest for end, digest in digests if commit.unit < end), None)
    return digest is None or commit.plan == digest


def snapshots(root: Folder) -> list[str]:
    """The fingerprints of all snapshots, oldest first."""
    return [plan.fingerprint for plan in published(read_info(root))]


def manifest_copy(number: int) -> str:
    """Where the manifest of the n-th snapshot is kept."""
    return f"manifests/{number}.parquet"


def manifest_name(info: DatasetInfo, number: int) -> str:
    """Where to read the n-th snapshot's manifest: while the dataset grows, `manifest.parquet` may be replaced at any moment."""
    return MANIFEST_FILE if number == len(info.plans) else manifest_copy(number)
