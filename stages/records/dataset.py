"""A dataset's folder, on disk or in a bucket, and how a reader opens it.

    DATASET/shards/00012-<attempt>.tar   DATASET/commits/00012.json   DATASET/manifest.parquet   DATASET/dataset.json
    DATASET/manifests/1.parquet

A shard counts once its commit record exists, and the first attempt at a unit to make one wins. Readers go by the
manifest and never list a folder to find out what is there. A dataset grows plan by plan: each that is made to its end is published as a
snapshot, whose manifest is kept, so that a reader can stay with it.
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
from stages.records.plans import fingerprint_of, manifest_name, of_snapshot, published, read_info
from stages.records.trajectory import schema_mismatch
from stages.storage.cache import ShardCache
from stages.storage.files import sha256
from stages.storage.folder import Folder, open_folder, unreadable

SKIPPED = "; training leaves it out with on_damage=skip"


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
                f"{self.root}: holds no dataset: name the folder of one, or make one there with "
                f"`python -m pipeline.generate --config FILE {self.root.override('output_dir')}` and a FILE of configs/generate"
            )
        whole = published(info)
        if not whole or not info["complete"]:
            raise self._unfinished(sum(plan["units"] for plan in whole or info["plans"]))
        known = [fingerprint_of(plan) for plan in whole]
        if snapshot is not None and snapshot not in known:
            message = ", ".join(fingerprint[:12] for fingerprint in known)
            raise UserError(f"{self.root}: has no snapshot {snapshot[:12]}, only {message}")
        number = len(known) if snapshot is None else 1 + known.index(snapshot)
        self.newest, self.fingerprint = number == len(known), known[number - 1]
        self.info = of_snapshot(info, whole[number - 1])
        content, problem = read_manifest(self.root, whole[number - 1], manifest_name(info, number))
        if content is None:
            raise damage_error(self.root, problem)
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
            raise DamageError(f"{damage_error(self.root, problems[0])}{SKIPPED}")

    def _unfinished(self, planned: int, done: int | None = None) -> UserError:
        done = len(committed_units(self.root)) if done is None else done
        return UserError(f"{self.root}: unfinished, {done} of {planned} units are there: {finishing(self.root)}")

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
        except PermissionError as error:
            raise unreadable(self.root, shard) from error
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
        if found := schema_mismatch(sample, self.info["tensors"]):
            raise self._damage(row["shard"], f"the tensors of {row['key']}", found)
        count = len(sample["timestep"])
        if count < row["records"] if "chosen" in row else count != row["records"]:
            raise self._damage(row["shard"], f"{row['records']} records in {row['key']}", str(count))
        return sample

    def _damage(self, shard: str, expected: str, found: str) -> DamageError:
        message = f"{damage_error(self.root, {'shard': shard, 'expected': expected, 'found': found})}{SKIPPED}"
        if self.cache is not None:
            message += f"; if that finds none, its copy in {self.cache.root} is damaged: remove {self._known[shard][0]}"
        return DamageError(message)

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
                own_header = json.dumps(alone).encode()
                content = len(own_header).to_bytes(8, "little") + own_header + file.read(end - begin)
                return safetensors.torch.load(content)["timestep"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
                raise self._damage(row["shard"], f"the timesteps of {row['key']}", "other bytes") from error


def finishing(root: Folder) -> str:
    """How to make what is missing of a dataset."""
    if not root.exists("config.yaml"):
        return "run the command that began it again, which makes the rest"
    config, copied = root.where("config.yaml"), ""
    if "://" in config:
        config, copied = "config.yaml", f", with a copy of {config},"
    return f"`python -m pipeline.generate --config {shlex.quote(config)} {root.override('output_dir')}`{copied} makes the rest"


def read_manifest(root: Folder, plan: dict[str, Any], name: str) -> tuple[bytes | None, dict[str, str]]:
    """(a snapshot's manifest from the file of that name, no problem), or (None, why not): it is not the one that was published."""
    content, expected = root.read(name), plan["manifest_sha256"]
    found = "no such file" if content is None else sha256(content)
    if found == expected:
        return content, {}
    return None, {"shard": name, "expected": f"SHA-256 {expected}", "found": found}


def size_problems(committed: dict[str, int], there: dict[str, int]) -> list[dict[str, str]]:
    """The shards that are missing or not of the size that was committed."""
    problems = []
    for shard, size in committed.items():
        if (found := there.get(shard)) != size:
            message = "no such file" if found is None else f"{found} bytes"
            problems.append({"shard": shard, "expected": f"{size} bytes", "found": message})
    return problems
