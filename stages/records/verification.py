"""The survey of a dataset: what it holds, and whether it is as it was written. It changes nothing; `repair.py` does."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.base.size import DEFAULT_SIZE, size_name
from stages.errors import DamageError, UserError
from stages.progress import progress
from stages.records.commits import READERS, commit_name, commit_names, read_commit
from stages.records.dataset import read_manifest, size_problems
from stages.records.inspection import BrokenError, inspect_shard
from stages.records.manifest import SCHEMA, decode_manifest, table_of, unit_of
from stages.records.plans import (
    DATASET_FILE,
    MANIFEST_FILE,
    PLANNED_UNIT,
    manifest_copy,
    manifest_name,
    matches_plan,
    plan_digests,
    read_info,
)
from stages.records.schema import Commit, DatasetInfo
from stages.storage.folder import Folder, open_folder
from stages.storage.hub import hub_hint

SCALE_BINS = 10
TIMESTEP_BINS = 10
FOLDERS = ("", "shards", "commits", "manifests", "preview")

Problem = dict[str, str]  # `shard`, `expected`, `found`


@dataclass
class Survey:
    """The findings about a dataset.

    Attributes:
        deep: whether the shards were read.
        sizes: of all files in `shards/`, in bytes by name.
        commits: the intact records of all plans, by unit.
        commit_problems: of files in `commits/` that are damaged or of no plan, by name.
        shard_problems: of committed shards, by unit.
        manifest_problems: of the manifests' files.
        differences: samples whose rows differ between a published manifest and its commit.
        unfinished: at most one problem: units are missing or not published.
        orphans: files that belong to no commit; sizes in bytes by name.
        timesteps: of the samples of each unit that was read and is whole.
    """

    root: Folder
    info: DatasetInfo
    deep: bool
    sizes: dict[str, int] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)
    commit_problems: dict[str, Problem] = field(default_factory=dict)
    shard_problems: dict[int, Problem] = field(default_factory=dict)
    manifest_problems: list[Problem] = field(default_factory=list)
    differences: list[Problem] = field(default_factory=list)
    unfinished: list[Problem] = field(default_factory=list)
    orphans: dict[str, int] = field(default_factory=dict)
    timesteps: dict[int, list[np.ndarray]] = field(default_factory=dict)

    @property
    def units(self) -> range:
        """The units of the newest snapshot, or of the plan under way if there is no snapshot."""
        return range(sum(plan.units for plan in self.info.published or self.info.plans))

    @property
    def problems(self) -> list[Problem]:
        found = [*self.commit_problems.values(), *self.unfinished, *self.manifest_problems, *self.differences]
        return found + [self.shard_problems[unit] for unit in sorted(self.shard_problems)]

    def summary(self) -> dict[str, Any]:
        """Return the content of `verification.json`."""
        commits = [commit for unit, commit in self.commits.items() if unit in self.units]
        rows = [row for commit in commits for row in commit.samples]
        return {
            "ok": not self.problems,
            "deep": self.deep,
            "trajectories": len({row["trajectory"] for row in rows}),
            "records": sum(row["records"] for row in rows),
            "bytes": sum(commit.size for commit in commits),
            "shards": len(commits),
            "growth": self._growth(),
            "histograms": self._histograms(rows),
            "problems": self.problems,
            "orphans": {
                "count": len(self.orphans),
                "bytes": sum(self.orphans.values()),
                "names": list(self.orphans),
            },
        }

    def _growth(self) -> dict[str, int]:
        """Count the units beyond the newest snapshot."""
        planned = range(self.units.stop, sum(plan.units for plan in self.info.plans))
        return {"units_planned": len(planned), "units_committed": sum(unit in self.commits for unit in planned)}

    def _histograms(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        classes = np.array([row["class_label"] for row in rows if row["class_label"] is not None], dtype=int)
        labels, counts = np.unique(classes, return_counts=True)
        histograms = {
            "scale": _histogram(np.array([row["scale"] for row in rows]), SCALE_BINS),
            "class_label": {str(label): int(count) for label, count in zip(labels, counts, strict=True)},
        }
        sizes = Counter(size_name(row) for row in rows)
        if sizes.keys() - {DEFAULT_SIZE}:
            histograms["size"] = dict(sorted(sizes.items()))
        if self.deep:
            timesteps = [values for unit in self.units for values in self.timesteps.get(unit, [])]
            histograms["timestep"] = _histogram(np.concatenate([np.empty(0), *timesteps]), TIMESTEP_BINS)
        return histograms


def verify(address: str | Path, deep: bool = True) -> dict[str, Any]:
    """Survey a dataset; in its summary, `ok` is true only if there is a snapshot and nothing is missing or damaged.

    Raises:
        UserError: there is no dataset at `address`, or its `dataset.json` is damaged.
    """
    return survey(open_folder(address), deep).summary()


def survey(root: Folder, deep: bool) -> Survey:
    """Survey a dataset.

    Args:
        deep: read every shard.

    Raises:
        UserError: there is no dataset, or its `dataset.json` is damaged.
    """
    found = Survey(root, _read_info(root), deep)
    _survey_commits(found)
    _survey_units(found)
    if found.info.complete:  # otherwise the manifests are those of before the repair
        _survey_manifests(found)
    _survey_shards(found)
    found.orphans = _orphans(found)
    return found


def _read_info(root: Folder) -> DatasetInfo:
    info = read_info(root)
    if info is None:
        raise UserError(f"{root}: holds no dataset: there is no {DATASET_FILE} in it{hub_hint(root)}")
    return info


def _survey_commits(found: Survey) -> None:
    def read(name: str) -> Commit | None:
        try:
            return read_commit(found.root, name)
        except DamageError:
            return None

    names = commit_names(found.root)
    with ThreadPoolExecutor(READERS) as threads:
        for name, commit in zip(names, threads.map(read, names), strict=True):
            if commit is None:
                found.commit_problems[name] = {"shard": name, "expected": "a commit record", "found": "damage"}
            else:
                found.commits[commit.unit] = commit
    # Read again, because another run may have added a plan and committed units of it since.
    digests = plan_digests(_read_info(found.root))
    planned = digests[-1][0]
    for unit, commit in list(found.commits.items()):
        if unit >= planned:
            problem = {"expected": f"one of the {planned} planned units", "found": f"{unit:05d}, beyond the plan"}
        elif not matches_plan(commit, digests):
            problem = {"expected": PLANNED_UNIT, "found": "one of another"}
        else:
            continue
        name = commit_name(unit)
        found.commit_problems[name] = {"shard": name} | problem
        del found.commits[unit]


def _survey_units(found: Survey) -> None:
    """Find missing units of the newest snapshot, or of the first one to be."""
    missing = [f"{unit:05d}" for unit in found.units if unit not in found.commits]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        message = f"{len(found.units) - len(missing)}, without {', '.join(missing[:5])}{more}"
    elif not found.info.complete:
        message = f"{len(found.units)}, not yet published"
    else:
        return
    found.unfinished.append({"shard": DATASET_FILE, "expected": f"{len(found.units)} units", "found": message})


def _survey_manifests(found: Survey) -> None:
    end = 0
    for number, plan in enumerate(found.info.published, start=1):
        end += plan.units
        name, copy = manifest_name(found.info, number), manifest_copy(number)
        content, problem = read_manifest(found.root, plan, name)
        if content is None:
            found.manifest_problems.append(problem)
        else:
            found.differences += _differences(found, range(end), decode_manifest(content))
        if name == MANIFEST_FILE:
            content, problem = read_manifest(found.root, plan, copy)
            if content is None:
                found.manifest_problems.append(problem)


def _differences(found: Survey, units: range, manifest: pa.Table) -> list[Problem]:
    """Find samples whose rows differ between a manifest and the commits of its units that are intact."""
    committed = table_of(found.commits[unit] for unit in units if unit in found.commits)
    unread = {unit for unit in units if unit not in found.commits}
    rows = (tuple(row.values()) for row in manifest.to_pylist() if unit_of(row["shard"]) not in unread)
    differing = Counter(rows)
    differing.subtract(tuple(row.values()) for row in committed.to_pylist())
    shard, key = (SCHEMA.get_field_index(name) for name in ("shard", "key"))
    return [
        {"shard": name, "expected": f"{sample} in the manifest as in its commit", "found": "a difference"}
        for name, sample in sorted({(row[shard], row[key]) for row, count in differing.items() if count})
    ]


def _survey_shards(found: Survey) -> None:
    found.sizes = found.root.list("shards")
    by_shard = {commit.shard: unit for unit, commit in found.commits.items()}
    committed = {commit.shard: commit.size for commit in found.commits.values()}
    for problem in size_problems(committed, found.sizes):
        found.shard_problems[by_shard[problem["shard"]]] = problem
    _find_duplicates(found)
    if not found.deep:
        return
    with progress(len(found.commits), "verify", "shards") as bar:
        for unit, commit in sorted(found.commits.items()):
            if unit not in found.shard_problems:
                try:
                    size = found.info.sizes.get(commit.size_name)
                    tensors = commit.tensors if size is None else size.tensors
                    found.timesteps[unit] = inspect_shard(found.root, commit, tensors)
                except BrokenError as broken:
                    expected, what = broken.args
                    found.shard_problems[unit] = {"shard": commit.shard, "expected": expected, "found": what}
            bar.update()


def _find_duplicates(found: Survey) -> None:
    """Report every shard with a key that two samples have: either may be the wrong one."""
    counts = Counter(row["key"] for commit in found.commits.values() for row in commit.samples)
    if counts.total() == len(counts):
        return
    for unit, commit in found.commits.items():
        for key in (row["key"] for row in commit.samples if counts[row["key"]] > 1):
            problem = {"expected": f"one sample {key} in the dataset", "found": str(counts[key])}
            found.shard_problems.setdefault(unit, {"shard": commit.shard} | problem)


def _orphans(found: Survey) -> dict[str, int]:
    """Find shards that no commit names, and temporary files of unfinished writes."""
    named = {commit.shard for commit in found.commits.values()}
    unknown = {unit_of(name) for name in found.commit_problems}  # a damaged commit may name any of its unit's shards
    orphans = {
        name: size
        for name, size in found.sizes.items()
        if name not in named and unit_of_file(name) not in unknown and not is_named(found.root, name)
    }
    for folder in FOLDERS:
        orphans |= found.root.leftovers(folder)
    return orphans


def unit_of_file(name: str) -> int | None:
    """Return the unit of a file in `shards/` or `commits/`, temporary files included; None for other files."""
    if not name.startswith(("shards/", "commits/")):
        return None
    number = Path(name).name.lstrip(".").partition("-")[0].partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() else None


def is_named(root: Folder, shard: str) -> bool:
    """Return whether a commit record names the shard, or may: a damaged record may name any shard of its unit."""
    unit = unit_of_file(shard)
    if unit is None or not root.exists(name := commit_name(unit)):
        return False
    try:
        return read_commit(root, name).shard == shard
    except DamageError:
        return True


def _histogram(values: np.ndarray, bins: int) -> list[dict[str, float]]:
    if not len(values):
        return []
    counts, edges = np.histogram(values, bins)
    return [
        {"from": float(low), "to": float(high), "count": int(count)}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
