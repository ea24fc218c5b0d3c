"""Read a whole dataset once: what is in it, and is every byte as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch

from stages.errors import UserError
from stages.progress import progress
from stages.records.dataset import (
    DATASET_FILE,
    MANIFEST_FILE,
    commit_paths,
    manifest_problems,
    read_commit,
    read_info,
    size_problems,
)
from stages.records.manifest import SCHEMA, read_manifest, table_of
from stages.records.shard import hash_file

SCALE_BINS = 10
TIMESTEP_BINS = 10


def verify(root: Path) -> dict[str, Any]:
    """Counts, histograms and problems; `ok` is true only if the dataset is finished and nothing in it is damaged.

    Raises:
        UserError: there is no dataset at `root`.
    """
    info = read_info(root)
    if info is None:
        raise UserError(f"{root}: holds no dataset: there is no {DATASET_FILE} in it")
    commits, problems = _read_commits(root)
    problems += _unfinished(info, commits)
    if not problems and not (problems := manifest_problems(root, info)):
        manifest = read_manifest(root / MANIFEST_FILE)
        problems = _differences(commits, manifest) + size_problems(root, manifest)
    known_bad = {problem["shard"] for problem in problems}
    timesteps: list[np.ndarray] = []
    with progress(len(commits), "verify", "shards") as bar:
        for commit in commits.values():
            if commit["shard"] not in known_bad:
                problems += _read_shard(root, commit, timesteps)
            bar.update()
    rows = [row for commit in commits.values() for row in commit["samples"]]
    return {
        "ok": not problems,
        "trajectories": len({row["trajectory"] for row in rows}),
        "records": sum(row["records"] for row in rows),
        "bytes": sum(commit["size"] for commit in commits.values()),
        "shards": len(commits),
        "histograms": _histograms(rows, timesteps),
        "problems": problems,
    }


def _read_commits(root: Path) -> tuple[dict[int, Any], list[dict[str, str]]]:
    """The commit records that are as they were written, and a problem for each of the others."""
    commits, problems = {}, []
    for path in commit_paths(root):
        try:
            commits[int(path.stem)] = read_commit(path)
        except (UserError, ValueError):
            problems.append({"shard": f"commits/{path.name}", "expected": "a commit record", "found": "damage"})
    return commits, problems


def _unfinished(info: dict[str, Any], commits: dict[int, Any]) -> list[dict[str, str]]:
    planned = set(range(info["plan"]["units"]))
    missing, beyond = sorted(planned - set(commits)), sorted(set(commits) - planned)
    if info["complete"] and not missing and not beyond:
        return []
    told = [f"without {_named(missing)}" if missing else "", f"with {_named(beyond)} beyond the plan" if beyond else ""]
    found = ", ".join(part for part in (str(len(commits)), *told) if part)
    if not missing and not beyond:
        found += ", not yet published"
    return [{"shard": DATASET_FILE, "expected": f"{len(planned)} units", "found": found}]


def _named(units: list[int]) -> str:
    return ", ".join(f"{unit:05d}" for unit in units[:5]) + (", ..." if len(units) > 5 else "")


def _differences(commits: dict[int, Any], manifest: pa.Table) -> list[dict[str, str]]:
    """The samples of which the manifest tells other than their commit does."""
    committed = {tuple(row.values()) for row in table_of(commits.values()).to_pylist()}
    listed = {tuple(row.values()) for row in manifest.to_pylist()}
    place = [SCHEMA.get_field_index(name) for name in ("shard", "key")]
    differing = sorted({tuple(row[i] for i in place) for row in committed ^ listed})
    return [
        {"shard": shard, "expected": f"{key} in the manifest as in its commit", "found": "a difference"}
        for shard, key in differing
    ]


def _read_shard(root: Path, commit: dict[str, Any], timesteps: list[np.ndarray]) -> list[dict[str, str]]:
    """Hash a shard and take the timesteps of its samples; the problems found."""
    path = root / commit["shard"]
    found = hash_file(path) if path.exists() else "no such file"
    if found != commit["sha256"]:
        return [{"shard": commit["shard"], "expected": f"SHA-256 {commit['sha256']}", "found": found}]
    with path.open("rb") as file:
        for row in commit["samples"]:
            file.seek(row["offset"])
            try:
                steps = safetensors.torch.load(file.read(row["size"]))["timestep"]
            except (safetensors.SafetensorError, KeyError) as error:
                return [{"shard": commit["shard"], "expected": f"the tensors of {row['key']}", "found": str(error)}]
            timesteps.append(steps.double().numpy())
    return []


def _histograms(rows: list[dict[str, Any]], timesteps: list[np.ndarray]) -> dict[str, Any]:
    classes = np.array([row["class_label"] for row in rows if row["class_label"] is not None], dtype=int)
    labels, counts = np.unique(classes, return_counts=True)
    return {
        "scale": _histogram(np.array([row["scale"] for row in rows]), SCALE_BINS),
        "timestep": _histogram(np.concatenate([np.empty(0), *timesteps]), TIMESTEP_BINS),
        "class_label": {str(label): int(count) for label, count in zip(labels, counts, strict=True)},
    }


def _histogram(values: np.ndarray, bins: int) -> list[dict[str, float]]:
    if not len(values):
        return []
    counts, edges = np.histogram(values, bins)
    return [
        {"from": float(low), "to": float(high), "count": int(count)}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
