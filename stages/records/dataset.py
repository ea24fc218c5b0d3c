"""A dataset's folder, on disk or in a bucket: what is committed, what is published, and how a reader opens it.

    DATASET/shards/00012-<attempt>.tar   DATASET/commits/00012.json   DATASET/manifest.parquet   DATASET/dataset.json
    DATASET/manifests/1.parquet

A shard counts once its commit record exists, and the first attempt at a unit to make one wins. Readers go by the
manifest and never list a folder to find out what is there. A dataset grows plan by plan: each that is made to its end is published as a
snapshot, whose manifest is kept, so that a reader can stay with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import uuid
import zlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import safetensors
import safetensors.torch
from torch import Tensor

from stages.errors import DamageError, UserError
from stages.records.cache import ShardCache
from stages.records.folder import Folder, open_folder
from stages.records.manifest import decode_manifest, encode_manifest, fingerprint, table_of, unit_of
from stages.records.record import misfit
from stages.records.shard import Sample, hash_file, write_shard
from stages.records.storage import seal, unseal

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
SKIPPED = "; training leaves it out with on_damage=skip"
# What `dataset.json` tells of each snapshot, and of the newest one again beside what all have in common.
OF_A_SNAPSHOT = ("config", "conditions", "guidance", "counts", "manifest_sha256")
DEFINING = ("units", "trajectories", "guidance", "conditions", "config")  # of a plan: what decides what it makes
OF_THE_PLAN = "a unit of the plan in dataset.json"
COMMITS_AT_ONCE = 1024
READERS = 16  # a request to a bucket mostly waits
COMMITS_OF_A_READER = COMMITS_AT_ONCE // READERS  # to pass them on one by one takes longer than to read them


def commit_unit(root: Folder, unit: int, samples: Iterable[Sample], plan: str | None = None) -> dict[str, Any]:
    """Write a unit's shard and commit it; returns the commit record that won, be it this attempt's or an earlier one's.

    Args:
        plan: the digest of the unit's plan, as `plan_digests` has it.
    """
    shard = f"shards/{unit:05d}-{uuid.uuid4().hex[:8]}.tar"
    record = commit_name(unit)
    samples = list(samples)
    with root.whole_file(shard) as file:
        rows = write_shard(file, samples)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        sha256 = hash_file(file)
    tensors = samples[0].tensors
    commit = {
        "unit": unit, "plan": plan, "shard": shard, "size": size, "sha256": sha256, "tensors": tensors, "samples": rows,
    }  # fmt: skip
    if not root.create(record, seal(commit)):
        root.delete(shard)
    return read_commit(root, record)


def commit_names(root: Folder) -> list[str]:
    """The files of all commit records, in the order of the plan, in which five digits come before six."""
    numbered = [name for name in root.list("commits") if re.fullmatch(r"commits/\d+\.json", name)]
    return sorted((name for name in numbered if name == commit_name(unit_of(name))), key=unit_of)


def read_commit(root: Folder, name: str) -> dict[str, Any]:
    """One commit record.

    Raises:
        UserError: it is not as it was written.
    """
    try:
        commit = unseal(root.read(name) or b"")
        if commit["unit"] != unit_of(name) or not re.fullmatch(rf"shards/0*{unit_of(name)}-\w+\.tar", commit["shard"]):
            raise ValueError("of another unit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{root.where(name)}: damaged: `python -m pipeline.verify {root.word('data_dir')} repair=true` sets it aside; "
            "then generate again, which makes its unit anew"
        ) from error
    return commit


def committed_units(root: Folder) -> list[int]:
    """The units that have a commit record, in the order of the plan; none is read."""
    return [unit_of(name) for name in commit_names(root)]


def is_committed(root: Folder, unit: int) -> bool:
    """Whether a unit has a commit record by now."""
    return root.exists(commit_name(unit))


def commit_name(unit: int) -> str:
    """The file of a unit's commit record."""
    return f"commits/{unit:05d}.json"


def read_commits(root: Folder) -> Iterator[dict[str, Any]]:
    """Every commit record, in the order of the plan; few of them are in memory at once.

    Raises:
        UserError: one is not as it was written.
    """

    def read(units: list[int]) -> list[dict[str, Any]]:
        return [read_commit(root, commit_name(unit)) for unit in units]

    units = committed_units(root)
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(units), COMMITS_AT_ONCE):
            some = units[start : start + COMMITS_AT_ONCE]
            parts = [some[i : i + COMMITS_OF_A_READER] for i in range(0, len(some), COMMITS_OF_A_READER)]
            yield from chain.from_iterable(threads.map(read, parts))


def write_info(root: Folder, info: dict[str, Any]) -> None:
    """Write `dataset.json`."""
    root.write(DATASET_FILE, seal({"schema_version": SCHEMA_VERSION} | info))


def begin_plan(root: Folder, info: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Write into `dataset.json` what the dataset is meant to hold further, before its first shard; what is published stays.

    Args:
        info: the description so far, with no plan under way.
        plan: `units` and `trajectories`, those of this plan alone; `config`, `conditions`, `guidance`.

    Returns:
        The new description.
    """
    info = info | {"plans": [*info["plans"], plan]}
    if (number := len(published(info))) == 0:
        info = of_snapshot(info, plan)
    elif (content := root.read(MANIFEST_FILE)) and _sha256(content) == info["manifest_sha256"]:
        root.write(manifest_copy(number), content)  # for datasets from before there were copies
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
                told = {"shard": commit_name(unit), "expected": OF_THE_PLAN, "found": "one of another"}
                raise DamageError(_told(root, told))
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
    of_rows = fingerprint(table)
    if before is not None and "fingerprint" not in plan and fingerprint(before) == of_rows:
        of_rows = plan["manifest_sha256"]  # as the checkpoints know a dataset from before there were fingerprints
    counts = {
        "trajectories": pc.count_distinct(table["trajectory"]).as_py(),
        "samples": len(table),
        "records": pc.sum(table["records"]).as_py(),
    }
    return content, {"counts": counts, "manifest_sha256": _sha256(content), "fingerprint": of_rows}


def _as_published(root: Folder, number: int, plan: dict[str, Any]) -> bytes | None:
    """The manifest of the n-th plan, if it is there as it was published."""
    contents = (root.read(name) for name in (manifest_copy(number), MANIFEST_FILE))
    return next((content for content in contents if content and _sha256(content) == plan.get("manifest_sha256")), None)


def published(info: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The plans that were made to their end, oldest first; each is a snapshot, and at most one more is under way.

    Where `info` is not `complete`, units of theirs are made again.
    """
    return [] if info is None else [plan for plan in info["plans"] if "manifest_sha256" in plan]


def plan_digests(info: dict[str, Any]) -> list[tuple[int, str]]:
    """For each plan the unit after its last, and the SHA-256 of all that decides what its units hold."""
    told: list[Any] = [info.get("teacher")]
    digests, end = [], 0
    for plan in info["plans"]:
        told.append({key: plan.get(key) for key in DEFINING})
        end += plan["units"]
        digests.append((end, _sha256(json.dumps(told, sort_keys=True).encode())))
    return digests


def is_of_plan(commit: dict[str, Any], digests: list[tuple[int, str]]) -> bool:
    """Whether a commit's unit was made by the plan that it belongs to; older commits do not tell, and no plan has those beyond all."""
    digest = next((digest for end, digest in digests if commit["unit"] < end), None)
    return commit.get("plan") is None or digest is None or commit["plan"] == digest


def fingerprint_of(plan: dict[str, Any]) -> str:
    """What tells a snapshot from any other; datasets from before there were fingerprints have their manifest's SHA-256."""
    return plan.get("fingerprint", plan["manifest_sha256"])


def of_snapshot(info: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The description of a dataset as it was once that plan was made."""
    return info | {key: plan[key] for key in OF_A_SNAPSHOT if key in plan}


def manifest_copy(number: int) -> str:
    """Where the manifest of the n-th snapshot is kept."""
    return f"manifests/{number}.parquet"


def manifest_name(info: dict[str, Any], number: int) -> str:
    """Where to read the n-th snapshot's manifest: while the dataset grows, `manifest.parquet` may be replaced at any moment."""
    return MANIFEST_FILE if number == len(info["plans"]) else manifest_copy(number)


def read_info(root: Folder) -> dict[str, Any] | None:
    """The content of `dataset.json`, or None where there is none.

    Raises:
        UserError: it is not readable, or of a newer schema than this version knows.
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
        info = unseal(content)
        if "plan" in info:  # from before datasets could grow
            plan = info.pop("plan") | {key: info[key] for key in OF_A_SNAPSHOT if key in info}
            info["plans"] = [plan]
        return info
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: not as it was written; restore it, or generate into a new folder") from error


def snapshots(root: Folder) -> list[str]:
    """The fingerprints of all snapshots, oldest first."""
    return [fingerprint_of(plan) for plan in published(read_info(root))]


class Dataset:
    """A whole dataset, opened for reading.

    Args:
        root: its folder, on disk or in a bucket (`s3://bucket/prefix`, `gs://...`, `az://...`).
        snapshot: the fingerprint of the one to open; by default the newest.
        check_sizes: refuse a dataset with missing units, or missing or wrongly sized shards; else they are found when they
            are read.
        cache: where shards are kept once they are fetched.

    Attributes:
        root: its folder.
        info: the content of `dataset.json`, as of the snapshot.
        manifest: the table of samples.
        newest: whether there is no later snapshot.
        fingerprint: tells what this snapshot holds from what any other does.

    Raises:
        UserError: there is no dataset, or no such snapshot of it, it is unfinished, of a newer schema, or a file is missing or of another size.
    """

    def __init__(
        self,
        root: str | Path,
        snapshot: str | None = None,
        check_sizes: bool = True,
        cache: ShardCache | None = None,
    ) -> None:
        self.root, self.cache = open_folder(root), cache
        info = read_info(self.root)
        if info is None:
            raise UserError(
                f"{self.root}: holds no dataset: make one with `python -m pipeline.generate {self.root.word('output_dir')}`"
            )
        whole = published(info)
        if not whole or not info["complete"]:
            raise self._unfinished(sum(plan["units"] for plan in whole or info["plans"]))
        known = [fingerprint_of(plan) for plan in whole]
        if snapshot is not None and snapshot not in known:
            told = ", ".join(fingerprint[:12] for fingerprint in known)
            raise UserError(f"{self.root}: has no snapshot {snapshot[:12]}, only {told}")
        number = len(known) if snapshot is None else 1 + known.index(snapshot)
        self.newest, self.fingerprint = number == len(known), known[number - 1]
        self.info = of_snapshot(info, whole[number - 1])
        content, problem = read_manifest(self.root, whole[number - 1], manifest_name(info, number))
        if content is None:
            raise DamageError(_told(self.root, problem))
        self.manifest = decode_manifest(content)
        shards = self.manifest.group_by(["shard", "shard_sha256", "shard_size"]).aggregate([]).to_pylist()
        self._known = {shard["shard"]: (shard["shard_sha256"], shard["shard_size"]) for shard in shards}
        if check_sizes:
            self._check_sizes()

    def _check_sizes(self) -> None:
        committed = set(committed_units(self.root))
        if any(unit_of(shard) not in committed for shard in self._known):
            raise self._unfinished(len(self._known), sum(unit_of(shard) in committed for shard in self._known))
        sizes = {shard: size for shard, (_, size) in self._known.items()}
        if problems := size_problems(sizes, self.root.list("shards")):
            raise DamageError(_told(self.root, problems[0]) + SKIPPED)

    def _unfinished(self, planned: int, done: int | None = None) -> UserError:
        done = len(committed_units(self.root)) if done is None else done
        return UserError(
            f"{self.root}: unfinished, {done} of {planned} units are there: run the command that began it again"
        )

    def open(self, shard: str) -> BinaryIO:
        """A shard, to read samples from.

        Raises:
            UserError: it is missing.
        """
        try:
            if self.cache is None:
                return self.root.open(shard)
            return self.cache.open(self.root, shard, *self._known[shard])
        except FileNotFoundError as error:
            raise self._damage(shard, "a shard", "no such file") from error
        except OSError as error:
            raise self._damage(shard, "a shard", str(error.strerror)) from error

    def read(self, file: BinaryIO, row: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of one sample, checked, from its open shard: those of `PER_RECORD` `[k, ...]`, and `cond.*`.

        Raises:
            UserError: the bytes are not those that were written, or not those of the tensors that `dataset.json` tells of.
        """
        try:
            file.seek(row["offset"])
            content = file.read(row["size"])
        except OSError as error:
            raise self._damage(row["shard"], f"the bytes of {row['key']}", str(error.strerror)) from error
        checksum = zlib.crc32(content)
        if checksum != row["checksum"]:
            raise self._damage(row["shard"], f"CRC-32 {row['checksum']:08x} of {row['key']}", f"{checksum:08x}")
        try:
            sample = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise self._damage(row["shard"], f"the tensors of {row['key']}", str(error)) from error
        if found := misfit(sample, self.info["tensors"]):
            raise self._damage(row["shard"], f"the tensors of {row['key']}", found)
        count = len(sample["timestep"])
        if count < row["records"] if "chosen" in row else count != row["records"]:
            raise self._damage(row["shard"], f"{row['records']} records in {row['key']}", str(count))
        return sample

    def _damage(self, shard: str, expected: str, found: str) -> DamageError:
        told = _told(self.root, {"shard": shard, "expected": expected, "found": found}) + SKIPPED
        if self.cache is not None:
            told += f"; if that finds none, its copy in {self.cache.root} is damaged: remove {self._known[shard][0]}"
        return DamageError(told)

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
                if not 0 <= begin <= end <= row["size"]:
                    raise ValueError("beyond the sample")
                file.seek(row["offset"] + 8 + length + begin)
                alone = {"timestep": header["timestep"] | {"data_offsets": [0, end - begin]}}
                told = json.dumps(alone).encode()
                content = len(told).to_bytes(8, "little") + told + file.read(end - begin)
                return safetensors.torch.load(content)["timestep"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
                raise self._damage(row["shard"], f"the timesteps of {row['key']}", "other bytes") from error


def read_manifest(root: Folder, plan: dict[str, Any], name: str) -> tuple[bytes | None, dict[str, str]]:
    """(a snapshot's manifest from the file of that name, no problem), or (None, why not): it is not the one that was published."""
    content, expected = root.read(name), plan["manifest_sha256"]
    found = "no such file" if content is None else _sha256(content)
    if found == expected:
        return content, {}
    return None, {"shard": name, "expected": f"SHA-256 {expected}", "found": found}


def size_problems(committed: dict[str, int], there: dict[str, int]) -> list[dict[str, str]]:
    """The shards that are missing or not of the size that was committed."""
    problems = []
    for shard, size in committed.items():
        if (found := there.get(shard)) != size:
            told = "no such file" if found is None else f"{found} bytes"
            problems.append({"shard": shard, "expected": f"{size} bytes", "found": told})
    return problems


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _told(root: Folder, problem: dict[str, str]) -> str:
    return (
        f"{root.where(problem['shard'])}: damaged: expected {problem['expected']}, found {problem['found']}: "
        f"`python -m pipeline.verify {root.word('data_dir')}` lists all damage"
    )
