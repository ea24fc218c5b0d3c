"""A dataset's folder: what is committed, what is published, and how a reader opens it.

    DATASET/shards/00012-<attempt>.tar   DATASET/commits/00012.json   DATASET/manifest.parquet   DATASET/dataset.json

A shard counts once its commit record exists, and the first attempt at a unit to make one wins. Readers go by the
manifest and never list a folder.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import safetensors
import safetensors.torch
from torch import Tensor

from stages.errors import UserError
from stages.records.manifest import read_manifest, table_of, write_manifest
from stages.records.record import Trajectory, describe
from stages.records.shard import hash_file, write_shard
from stages.records.storage import create, seal, unseal, whole_file

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
SKIPPED = "; training leaves it out with on_damage=skip"


def commit_unit(root: Path, unit: int, trajectories: Iterable[Trajectory]) -> dict[str, Any]:
    """Write a unit's shard and commit it; returns the commit record that won, be it this attempt's or an earlier one's."""
    shard = root / "shards" / f"{unit:05d}-{uuid.uuid4().hex[:8]}.tar"
    record = root / "commits" / f"{unit:05d}.json"
    trajectories = list(trajectories)
    samples = write_shard(shard, trajectories)
    commit = {
        "unit": unit,
        "shard": f"shards/{shard.name}",
        "size": shard.stat().st_size,
        "sha256": hash_file(shard),
        "tensors": describe(trajectories[0]),
        "samples": samples,
    }
    if not create(record, seal(commit)):
        shard.unlink()
    return read_commit(record)


def commit_paths(root: Path) -> list[Path]:
    """The files of all commit records, in the order of the plan."""
    return sorted((root / "commits").glob("[0-9]*.json"))


def read_commit(path: Path) -> dict[str, Any]:
    """One commit record.

    Raises:
        UserError: it is not as it was written.
    """
    try:
        commit = unseal(path.read_bytes())
        if commit["unit"] != int(path.stem):
            raise ValueError("of another unit")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged: move it away and generate again, which makes its unit anew") from error
    return commit


def read_commits(root: Path) -> dict[int, dict[str, Any]]:
    """Every commit record by unit, in the order of the plan.

    Raises:
        UserError: one is not as it was written.
    """
    return {commit["unit"]: commit for commit in map(read_commit, commit_paths(root))}


def write_info(root: Path, info: dict[str, Any]) -> None:
    """Write `dataset.json`: what the dataset is meant to hold, before its first shard."""
    with whole_file(root / DATASET_FILE) as file:
        file.write(seal({"schema_version": SCHEMA_VERSION, "complete": False} | info))


def publish(root: Path, info: dict[str, Any], commits: list[dict[str, Any]]) -> None:
    """Write the manifest and say in `dataset.json` that the dataset is whole, so that readers open it."""
    write_manifest(root / MANIFEST_FILE, table_of(commits))
    rows = [row for commit in commits for row in commit["samples"]]
    counts = {
        "units": len(commits),
        "trajectories": len({row["trajectory"] for row in rows}),
        "samples": len(rows),
        "records": sum(row["records"] for row in rows),
        "bytes": sum(commit["size"] for commit in commits),
    }
    published = {"complete": True, "counts": counts, "tensors": commits[0]["tensors"]}
    write_info(root, info | published | {"manifest_sha256": hash_file(root / MANIFEST_FILE)})


def read_info(root: Path) -> dict[str, Any] | None:
    """The content of `dataset.json`, or None where there is none.

    Raises:
        UserError: it is not readable, or of a newer schema than this version knows.
    """
    path = root / DATASET_FILE
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        version = int(json.loads(content)["schema_version"])
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema {version} is newer than {SCHEMA_VERSION}, the newest known here: upgrade this project"
            )
        return unseal(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: not as it was written; restore it, or generate into a new folder") from error


class Dataset:
    """A whole dataset, opened for reading.

    Args:
        check_sizes: refuse a dataset with missing or wrongly sized shards; else they are found when they are read.

    Attributes:
        info: the content of `dataset.json`.
        manifest: the table of samples.

    Raises:
        UserError: there is no dataset, it is unfinished, of a newer schema, or a file is missing or of another size.
    """

    def __init__(self, root: str | Path, check_sizes: bool = True) -> None:
        self.root = Path(root)
        info = read_info(self.root)
        if info is None:
            raise UserError(
                f"{self.root}: holds no dataset: make one with `python -m pipeline.generate output_dir={self.root}`"
            )
        if not info["complete"]:
            done, planned = len(read_commits(self.root)), info["plan"]["units"]
            raise UserError(
                f"{self.root}: unfinished, {done} of {planned} units are there: run the command that began it again"
            )
        if problems := manifest_problems(self.root, info):
            raise UserError(_told(self.root, problems[0]))
        self.info = info
        self.manifest = read_manifest(self.root / MANIFEST_FILE)
        if check_sizes and (problems := size_problems(self.root, self.manifest)):
            raise UserError(_told(self.root, problems[0]) + SKIPPED)

    @property
    def fingerprint(self) -> str:
        """Tells this dataset from any other: the manifest holds the checksum of everything."""
        return self.info["manifest_sha256"]

    def open(self, shard: str) -> BinaryIO:
        """A shard, to read samples from.

        Raises:
            UserError: it is missing.
        """
        try:
            return (self.root / shard).open("rb")
        except FileNotFoundError as error:
            raise self._damage(shard, "a shard", "no such file") from error
        except OSError as error:
            raise self._damage(shard, "a shard", str(error.strerror)) from error

    def read(self, file: BinaryIO, row: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of one sample, checked, from its open shard: those of `PER_RECORD` `[k, ...]`, and `cond.*`.

        Raises:
            UserError: the bytes are not those that were written, or not those of tensors.
        """
        file.seek(row["offset"])
        content = file.read(row["size"])
        checksum = zlib.crc32(content)
        if checksum != row["checksum"]:
            raise self._damage(row["shard"], f"CRC-32 {row['checksum']:08x} of {row['key']}", f"{checksum:08x}")
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise self._damage(row["shard"], f"the tensors of {row['key']}", str(error)) from error

    def _damage(self, shard: str, expected: str, found: str) -> UserError:
        return UserError(_told(self.root, {"shard": shard, "expected": expected, "found": found}) + SKIPPED)

    def timesteps(self, row: dict[str, Any]) -> Tensor:
        """The timesteps `[k]` of one sample, read without the rest of it, and so not checked.

        Raises:
            UserError: there are none.
        """
        with self.open(row["shard"]) as file:
            try:
                file.seek(row["offset"])
                length = int.from_bytes(file.read(8), "little")  # of the header (safetensors' format)
                header = json.loads(file.read(min(length, row["size"])))
                begin, end = header["timestep"]["data_offsets"]
                file.seek(row["offset"] + 8 + length + begin)
                alone = {"timestep": header["timestep"] | {"data_offsets": [0, end - begin]}}
                told = json.dumps(alone).encode()
                content = len(told).to_bytes(8, "little") + told + file.read(end - begin)
                return safetensors.torch.load(content)["timestep"]
            except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                raise self._damage(row["shard"], f"the timesteps of {row['key']}", "other bytes") from error


def manifest_problems(root: Path, info: dict[str, Any]) -> list[dict[str, str]]:
    """Whether the manifest is the one that `dataset.json` was published with."""
    path = root / MANIFEST_FILE
    found = hash_file(path) if path.exists() else "no such file"
    if found == info["manifest_sha256"]:
        return []
    return [{"shard": MANIFEST_FILE, "expected": f"SHA-256 {info['manifest_sha256']}", "found": found}]


def size_problems(root: Path, manifest: pa.Table) -> list[dict[str, str]]:
    """The shards that are missing or not of the size that was committed."""
    problems = []
    for shard in manifest.group_by(["shard", "shard_size"]).aggregate([]).to_pylist():
        path = root / shard["shard"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["shard_size"]:
            found = "no such file" if size is None else f"{size} bytes"
            problems.append({"shard": shard["shard"], "expected": f"{shard['shard_size']} bytes", "found": found})
    return problems


def _told(root: Path, problem: dict[str, str]) -> str:
    return (
        f"{root / problem['shard']}: damaged: expected {problem['expected']}, found {problem['found']}: "
        f"`python -m pipeline.verify data_dir={root}` lists all damage"
    )
