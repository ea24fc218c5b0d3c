"""A dataset, opened for reading from a folder on disk or in a bucket.

    DATASET/shards/00012-<attempt>.tar   DATASET/commits/00012.json   DATASET/manifest.parquet   DATASET/dataset.json
    DATASET/manifests/1.parquet

A shard counts once its commit record exists, and the first attempt to create that record wins. Readers go by the
manifest and never list a folder to find samples. A dataset grows plan by plan. Each finished plan is published as a
snapshot, and its manifest is kept, so that a reader can stay with it.
"""

from __future__ import annotations

import json
import shlex
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from stages.errors import DamageError, UserError
from stages.records.commits import committed_units, damage_error
from stages.records.manifest import decode_manifest, unit_of
from stages.records.plans import manifest_name, read_info
from stages.records.schema import PublishedPlan
from stages.records.trajectory import schema_mismatch
from stages.storage.cache import ShardCache
from stages.storage.folder import Folder, open_folder, unreadable
from stages.storage.hub import hub_hint
from stages.storage.sealing import sha256

SKIP_HINT = "; training leaves it out with on_damage=skip"


class Dataset:
    """A whole dataset, opened for reading.

    Args:
        root: its folder, on disk or in a bucket (`s3://bucket/prefix`, `gs://...`, `az://...`).
        snapshot: fingerprint of the one to open; by default the newest.
        check_sizes: refuse missing units, and shards that are missing or of another size; otherwise reading finds them.
        cache: keeps shards once they are fetched.

    Attributes:
        root: its folder.
        info: the content of `dataset.json`.
        plan: the last of the snapshot's plans: its counts, conditions and configuration.
        manifest: the table of samples.
        newest: whether this is the newest snapshot.
        fingerprint: of what the snapshot's samples hold.

    Raises:
        UserError: there is no such dataset or snapshot, or the dataset is unfinished or of another schema.
        DamageError: a file is missing, or is not as it was written.
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
                f"{self.root}: holds no dataset: name the folder of one, or make one there with `python -m pipeline.generate "
                f"--config FILE {self.root.override('output_dir')}` and a FILE of configs/generate{hub_hint(self.root)}"
            )
        if not info.published or not info.complete:
            raise self._unfinished(sum(plan.units for plan in info.published or info.plans))
        fingerprints = [plan.fingerprint for plan in info.published]
        if snapshot is not None and snapshot not in fingerprints:
            message = ", ".join(fingerprint[:12] for fingerprint in fingerprints)
            raise UserError(f"{self.root}: has no snapshot {snapshot[:12]}, only {message}")
        number = len(fingerprints) if snapshot is None else 1 + fingerprints.index(snapshot)
        self.info, self.plan = info, info.published[number - 1]
        self.newest, self.fingerprint = number == len(fingerprints), self.plan.fingerprint
        content, problem = read_manifest(self.root, self.plan, manifest_name(info, number))
        if content is None:
            raise damage_error(self.root, problem)
        self.manifest = decode_manifest(content)
        shards = self.manifest.group_by(["shard", "shard_sha256", "shard_size"]).aggregate([]).to_pylist()
        self._shards = {shard["shard"]: (shard["shard_sha256"], shard["shard_size"]) for shard in shards}
        if check_sizes:
            self._check_sizes()

    def _check_sizes(self) -> None:
        committed = set(committed_units(self.root))
        if any(unit_of(shard) not in committed for shard in self._shards):
            raise self._unfinished(len(self._shards), sum(unit_of(shard) in committed for shard in self._shards))
        sizes = {shard: size for shard, (_, size) in self._shards.items()}
        if problems := size_problems(sizes, self.root.list("shards")):
            raise DamageError(f"{damage_error(self.root, problems[0])}{SKIP_HINT}")

    def _unfinished(self, planned: int, done: int | None = None) -> UserError:
        done = len(committed_units(self.root)) if done is None else done
        return UserError(f"{self.root}: unfinished, {done} of {planned} units are there: {how_to_finish(self.root)}")

    def open(self, shard: str) -> BinaryIO:
        """Open a shard to read samples from it.

        Raises:
            DamageError: it is missing or cannot be read.
            StorageError: this user may not read it.
        """
        try:
            if self.cache is None:
                return self.root.open(shard)
            return self.cache.open(self.root, shard, *self._shards[shard])
        except FileNotFoundError as error:
            raise self._damage(shard, "a shard", "no such file") from error
        except PermissionError as error:
            raise unreadable(self.root, shard) from error
        except OSError as error:
            raise self._damage(shard, "a shard", str(error.strerror)) from error

    def read(self, file: BinaryIO, row: dict[str, Any]) -> dict[str, Tensor]:
        """Read and check a sample's tensors: those of `PER_RECORD` `[k, ...]`, and `cond.*`.

        Args:
            file: the sample's shard.
            row: the sample's row of the manifest.

        Raises:
            DamageError: the bytes are not as they were written, or the tensors are not those of `dataset.json`.
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
        if found := schema_mismatch(sample, self.info.tensors_of(row)):
            raise self._damage(row["shard"], f"the tensors of {row['key']}", found)
        count = len(sample["timestep"])
        if count != row["records"]:
            raise self._damage(row["shard"], f"{row['records']} records in {row['key']}", str(count))
        return sample

    def _damage(self, shard: str, expected: str, found: str) -> DamageError:
        message = f"{damage_error(self.root, {'shard': shard, 'expected': expected, 'found': found})}{SKIP_HINT}"
        if self.cache is not None:
            message += (
                f"; if that finds none, its copy in {self.cache.root} is damaged: remove {self._shards[shard][0]}"
            )
        return DamageError(message)

    def timesteps(self, row: dict[str, Any]) -> Tensor:
        """Read the timesteps `[k]` of a sample, without the rest of it, and so without its checksum.

        Raises:
            DamageError: the sample holds none.
        """
        with self.open(row["shard"]) as file:
            try:
                file.seek(row["offset"])
                length = int.from_bytes(file.read(8), "little")  # of the safetensors header
                header = json.loads(file.read(min(length, row["size"])))
                begin, end = header["timestep"]["data_offsets"]
                if not 0 <= begin <= end <= row["size"]:
                    raise ValueError("beyond the sample")
                file.seek(row["offset"] + 8 + length + begin)
                selected = {"timestep": header["timestep"] | {"data_offsets": [0, end - begin]}}
                own_header = json.dumps(selected).encode()
                content = len(own_header).to_bytes(8, "little") + own_header + file.read(end - begin)
                return safetensors.torch.load(content)["timestep"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
                raise self._damage(row["shard"], f"the timesteps of {row['key']}", "other bytes") from error


def how_to_finish(root: Folder) -> str:
    """Name the command that makes the missing units of a dataset."""
    if not root.exists("config.yaml"):
        return "run the command that began it again, which makes the rest"
    config, copied = root.where("config.yaml"), ""
    if "://" in config:
        config, copied = "config.yaml", f", with a copy of {config},"
    command = f"python -m pipeline.generate --config {shlex.quote(config)} {root.override('output_dir')}"
    return f"`{command}`{copied} makes the rest"


def read_manifest(root: Folder, plan: PublishedPlan, name: str) -> tuple[bytes | None, dict[str, str]]:
    """Read a snapshot's manifest from a file: (content, no problem), or (None, problem) if it is another one."""
    content, expected = root.read(name), plan.manifest_sha256
    found = "no such file" if content is None else sha256(content)
    if found == expected:
        return content, {}
    return None, {"shard": name, "expected": f"SHA-256 {expected}", "found": found}


def size_problems(committed: dict[str, int], present: dict[str, int]) -> list[dict[str, str]]:
    """Compare the sizes of shards, in bytes by name: those that are missing or not of the committed size."""
    problems = []
    for shard, size in committed.items():
        if (found := present.get(shard)) != size:
            message = "no such file" if found is None else f"{found} bytes"
            problems.append({"shard": shard, "expected": f"{size} bytes", "found": message})
    return problems
