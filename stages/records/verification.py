"""Read a whole dataset once: what is in it, and is every byte as it was written."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch

from stages.errors import DamageError, UserError
from stages.progress import progress
from stages.records.dataset import (
    DATASET_FILE,
    READERS,
    commit_names,
    published,
    read_commit,
    read_info,
    read_manifest,
    size_problems,
    unit_of,
)
from stages.records.folder import READ_SIZE, Folder, open_folder
from stages.records.manifest import SCHEMA, decode_manifest, table_of

SCALE_BINS = 10
TIMESTEP_BINS = 10


def verify(address: str | Path) -> dict[str, Any]:
    """Counts, histograms and problems of the newest snapshot; `ok` is true only if there is one and nothing in it is damaged.

    Raises:
        UserError: there is no dataset at `address`.
    """
    root = open_folder(address)
    info = read_info(root)
    if info is None:
        raise UserError(f"{root}: holds no dataset: there is no {DATASET_FILE} in it")
    snapshots = published(info)
    commits, problems = _read_commits(root)
    problems += _unfinished(info, commits)
    end = sum(plan["units"] for plan in snapshots or info["plans"])
    commits = {unit: commit for unit, commit in commits.items() if unit < end}
    if not problems:
        manifests = [read_manifest(root, info, number) for number in range(1, len(snapshots) + 1)]
        problems = [problem for _, found in manifests for problem in found]
        if (content := manifests[-1][0]) is not None:
            manifest = decode_manifest(content)
            problems += _differences(commits, manifest) + size_problems(root, manifest)
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


def _read_commits(root: Folder) -> tuple[dict[int, Any], list[dict[str, str]]]:
    """The commit records that are as they were written, and a problem for each of the others."""

    def read(name: str) -> dict[str, Any] | None:
        try:
            return read_commit(root, name)
        except DamageError:
            return None

    names = commit_names(root)
    with ThreadPoolExecutor(READERS) as threads:
        found = list(zip(names, threads.map(read, names), strict=True))
    commits = {unit_of(name): commit for name, commit in found if commit is not None}
    damaged = [name for name, commit in found if commit is None]
    return commits, [{"shard": name, "expected": "a commit record", "found": "damage"} for name in damaged]


def _unfinished(info: dict[str, Any], commits: dict[int, Any]) -> list[dict[str, str]]:
    """Units that miss in the newest snapshot, and those that no plan knows, one under way among them."""
    planned = set(range(sum(plan["units"] for plan in published(info) or info["plans"])))
    known = set(range(sum(plan["units"] for plan in info["plans"])))
    missing, beyond = sorted(planned - set(commits)), sorted(set(commits) - known)
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


def _read_shard(root: Folder, commit: dict[str, Any], timesteps: list[np.ndarray]) -> list[dict[str, str]]:
    """Hash a shard and take the timesteps of its samples, all in one pass; the problems found."""
    digest = hashlib.sha256()
    taken, problems = [], []
    try:
        with root.open(commit["shard"]) as file:
            for row in commit["samples"]:
                digest.update(file.read(row["offset"] - file.tell()))
                content = file.read(row["size"])
                digest.update(content)
                try:
                    taken.append(safetensors.torch.load(content)["timestep"].double().numpy())
                except (safetensors.SafetensorError, KeyError) as error:
                    problem = {"expected": f"the tensors of {row['key']}", "found": str(error)}
                    problems.append({"shard": commit["shard"]} | problem)
            while piece := file.read(READ_SIZE):
                digest.update(piece)
        found = digest.hexdigest()
    except FileNotFoundError:
        found = "no such file"
    if found != commit["sha256"]:
        return [{"shard": commit["shard"], "expected": f"SHA-256 {commit['sha256']}", "found": found}]
    timesteps += taken
    return problems[:1]


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
