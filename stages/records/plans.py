"""`dataset.json`: what a dataset is, plan by plan. Each plan that is made to its end is a snapshot; at most one more is under way."""

from __future__ import annotations

import json
from typing import Any

from stages.errors import UserError
from stages.storage.files import seal, sha256, unseal
from stages.storage.folder import Folder, unreadable

SCHEMA_VERSION = 2
DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
# What `dataset.json` tells of each snapshot, and of the newest one again beside what all have in common.
OF_A_SNAPSHOT = ("config", "conditions", "guidance", "counts", "manifest_sha256")
DEFINING = ("units", "trajectories", "guidance", "conditions", "config")  # of a plan: what decides what it makes
PLACE_OF_TEACHER = "pretrained_model_name_or_path"
OF_THE_PLAN = "a unit of the plan in dataset.json"


def read_info(root: Folder) -> dict[str, Any] | None:
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
        return unseal(content)
    except PermissionError as error:
        raise unreadable(root, DATASET_FILE) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: not as it was written; restore it, or generate into a new folder") from error


def write_info(root: Folder, info: dict[str, Any]) -> None:
    """Write `dataset.json`."""
    root.write(DATASET_FILE, seal({"schema_version": SCHEMA_VERSION} | info))


def published(info: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The plans that were made to their end, oldest first; each is a snapshot, and at most one more is under way.

    Where `info` is not `complete`, units of theirs are made again.
    """
    return [] if info is None else [plan for plan in info["plans"] if "manifest_sha256" in plan]


def plan_digests(info: dict[str, Any]) -> list[tuple[int, str]]:
    """For each plan the unit after its last, and the SHA-256 of all that decides what its units hold."""
    defining: list[Any] = [_without_place(info.get("teacher"))]
    digests, end = [], 0
    for plan in info["plans"]:
        config = plan.get("config", {})
        config = config | {"teacher": _without_place(config.get("teacher"))}
        defining.append({key: plan.get(key) for key in DEFINING} | {"config": config})
        end += plan["units"]
        digests.append((end, sha256(json.dumps(defining, sort_keys=True).encode())))
    return digests


def _without_place(teacher: dict[str, Any] | None) -> dict[str, Any]:
    """What is told of a teacher, but where it was found: its weights tell which it is."""
    return {key: value for key, value in (teacher or {}).items() if key != PLACE_OF_TEACHER}


def is_of_plan(commit: dict[str, Any], digests: list[tuple[int, str]]) -> bool:
    """Whether a commit's unit was made by the plan that it belongs to, if it names one; no plan has those beyond all."""
    digest = next((digest for end, digest in digests if commit["unit"] < end), None)
    return commit.get("plan") is None or digest is None or commit["plan"] == digest


def of_snapshot(info: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The description of a dataset as it was once that plan was made."""
    return info | {key: plan[key] for key in OF_A_SNAPSHOT if key in plan}


def fingerprint_of(plan: dict[str, Any]) -> str:
    """What tells a snapshot from any other."""
    return str(plan["fingerprint"])


def snapshots(root: Folder) -> list[str]:
    """The fingerprints of all snapshots, oldest first."""
    return [fingerprint_of(plan) for plan in published(read_info(root))]


def manifest_copy(number: int) -> str:
    """Where the manifest of the n-th snapshot is kept."""
    return f"manifests/{number}.parquet"


def manifest_name(info: dict[str, Any], number: int) -> str:
    """Where to read the n-th snapshot's manifest: while the dataset grows, `manifest.parquet` may be replaced at any moment."""
    return MANIFEST_FILE if number == len(info["plans"]) else manifest_copy(number)
