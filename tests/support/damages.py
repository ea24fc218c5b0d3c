"""Damage to a finished dataset on disk, done to real files.

`DAMAGES` maps a name to a function that damages the dataset in a folder and returns the files that `verify` must name.
Checksums do not detect the damages in `SEALED`, because shard, commit and manifest were written again to agree: only
the content shows them.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch

from stages.records.commits import read_commits
from stages.records.manifest import decode_manifest, encode_manifest
from stages.records.plans import read_info
from stages.records.publication import publish
from stages.storage.folder import open_folder
from stages.storage.sealing import seal, unseal

Damage = Callable[[Path], list[str]]
Members = list[tuple[str, bytes]]
UNIT, PAGE = 1, 4096
ESCAPED = "escaped_from_the_shard"
UNPICKLED = "unpickled"


class Trap:
    """An object that makes a folder in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (UNPICKLED,)


def commit_of(root: Path, unit: int = UNIT) -> dict[str, Any]:
    return unseal((root / f"commits/{unit:05d}.json").read_bytes())


def bytes_of_shard(change: Callable[[bytearray, list[dict[str, Any]]], bytes | bytearray]) -> Damage:
    """Damage a shard's bytes by a function of the bytes and the commit's samples."""

    def damage(root: Path) -> list[str]:
        commit = commit_of(root)
        path = root / commit["shard"]
        path.write_bytes(change(bytearray(path.read_bytes()), commit["samples"]))
        return [commit["shard"]]

    return damage


def flip(content: bytearray, place: int) -> bytearray:
    content[place] ^= 4
    return content


def zero(content: bytearray, start: int, length: int) -> bytearray:
    content[start : start + length] = bytes(len(content[start : start + length]))
    return content


def members_of(content: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def tar_of(members: Members, kind: bytes = tarfile.REGTYPE) -> tuple[bytes, dict[str, int]]:
    """Return a shard of these members, the last one of the given type, and the offset of each one's bytes."""
    file, places = io.BytesIO(), {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (name, content) in enumerate(members, start=1):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if number == len(members) and kind != tarfile.REGTYPE:
                member.type, member.linkname, member.size = kind, "../../..", 0
            places[name] = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue(), places


def members(change: Callable[[Members], Members], kind: bytes = tarfile.REGTYPE) -> Damage:
    """Damage the members of a shard's tar, and nothing else."""
    return bytes_of_shard(lambda content, _: tar_of(change(members_of(content)), kind)[0])


def with_tensors(change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    """Replace the bytes of the first sample's tensors."""
    return lambda held: [held[0], (held[1][0], change(held[1][1])), *held[2:]]


def without(*places: int) -> Callable[[Members], Members]:
    return lambda held: [member for place, member in enumerate(held) if place not in places]


def as_pickle(_: bytes) -> bytes:
    return pickle.dumps({"latent": Trap()})


def with_header_of_2_to_63(tensors: bytes) -> bytes:
    return (1 << 63).to_bytes(8, "little") + tensors[8:]


def retensored(**changes: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[bytes], bytes]:
    """Change tensors; those that become None are left out."""

    def change(content: bytes) -> bytes:
        tensors = safetensors.torch.load(content)
        changed = {name: changes.get(name, lambda value: value)(value) for name, value in tensors.items()}
        return safetensors.torch.save({name: v.contiguous() for name, v in changed.items() if v is not None})

    return change


def escaping(held: Members) -> Members:
    return [*held, (f"/tmp/{ESCAPED}", b"absolute"), (f"../../../{ESCAPED}", b"upwards")]


def sealed(
    change: Callable[[Members], Members] = lambda held: held,
    rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda rows: rows,
    kind: bytes = tarfile.REGTYPE,
    tail: bytes = b"",
) -> Damage:
    """Damage a shard, then write its commit and the manifest again to agree with it."""

    def damage(root: Path) -> list[str]:
        commit = commit_of(root)
        held = change(members_of((root / commit["shard"]).read_bytes()))
        content, places = tar_of(held, kind)
        content += tail
        for row in commit["samples"]:
            row["offset"] = places.get(f"{row['key']}.safetensors", row["offset"])
            tensors = dict(held).get(f"{row['key']}.safetensors", content[row["offset"] :][: row["size"]])
            row |= {"size": len(tensors), "checksum": zlib.crc32(tensors)}
        (root / commit["shard"]).write_bytes(content)
        info = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "samples": rows(commit["samples"])}
        (root / f"commits/{UNIT:05d}.json").write_bytes(seal(commit | info))
        publish_again(root)
        return [commit["shard"]]

    return damage


def publish_again(root: Path) -> None:
    folder = open_folder(root)
    info = read_info(folder)
    assert info is not None
    publish(folder, info, read_commits(folder))


def sample_of_another_unit(root: Path) -> list[str]:
    other = commit_of(root, 0)
    held = members_of((root / other["shard"]).read_bytes())
    named = sealed(lambda own: [*held[:2], *own[2:]], lambda rows: [other["samples"][0], *rows[1:]])(root)
    return sorted([other["shard"], *named])


def missing_shard(root: Path) -> list[str]:
    shard = commit_of(root)["shard"]
    (root / shard).unlink()
    return [shard]


def swapped_shards(root: Path) -> list[str]:
    one, two = (root / commit_of(root, unit)["shard"] for unit in (1, 2))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    return [f"shards/{path.name}" for path in (one, two)]


def extra_shard(root: Path) -> list[str]:
    shutil.copy(root / commit_of(root)["shard"], root / "shards/00001-0badcafe.tar")
    return []


def missing_commit(root: Path) -> list[str]:
    (root / "commits/00001.json").unlink()
    return ["dataset.json"]


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(root: Path) -> list[str]:
        (root / name).write_bytes(change((root / name).read_bytes()))
        return [name, *(["dataset.json"] if name.startswith("commits") else [])]

    return damage


def swapped_commits(root: Path) -> list[str]:
    one, two = (root / f"commits/0000{unit}.json" for unit in (1, 2))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    return [f"commits/{one.name}", f"commits/{two.name}", "dataset.json"]


def missing_manifest(root: Path) -> list[str]:
    (root / "manifest.parquet").unlink()
    return ["manifest.parquet"]


def other_rows(content: bytes) -> bytes:
    table = decode_manifest(content)
    scale = pa.array([2.0 * value for value in table["scale"].to_pylist()], pa.float64())
    return encode_manifest(table.set_column(table.schema.get_field_index("scale"), table.schema.field("scale"), scale))


DAMAGES: dict[str, Damage] = {
    "a shard cut in a tar header": bytes_of_shard(lambda content, rows: content[: rows[1]["offset"] - 200]),
    "a shard cut in a payload": bytes_of_shard(lambda content, rows: content[: rows[1]["offset"] + 700]),
    "a shard cut between two members": bytes_of_shard(lambda content, rows: content[: rows[1]["offset"] - 512]),
    "a flipped bit in a tar header": bytes_of_shard(lambda content, rows: flip(content, rows[1]["offset"] - 500)),
    "a flipped bit in a payload": bytes_of_shard(lambda content, rows: flip(content, rows[1]["offset"] + 700)),
    "a zeroed page": bytes_of_shard(lambda content, _: zero(content, PAGE, PAGE)),
    "a shard's tail overwritten with zeros": bytes_of_shard(
        lambda content, rows: zero(content, rows[2]["offset"] + 600, len(content))
    ),
    "a tail of zeros appended to a shard": bytes_of_shard(lambda content, _: content + bytes(PAGE)),
    "an empty shard": bytes_of_shard(lambda *_: b""),
    "a missing shard": missing_shard,
    "two shards swapped": swapped_shards,
    "an extra shard": extra_shard,
    "a sample twice in a shard": members(lambda held: [*held, *held[:2]]),
    "a sample without tensors": members(without(1)),
    "a sample without its description": members(without(2)),
    "a shard with names that lead out of it": members(escaping),
    "a shard with a link that leads out of it": members(lambda held: [*held, ("link", b"")], tarfile.SYMTYPE),
    "a pickle in place of tensors": members(with_tensors(as_pickle)),
    "tensors with a header of 2^63 bytes": members(with_tensors(with_header_of_2_to_63)),
    "a missing commit record": missing_commit,
    "an empty commit record": bytes_of("commits/00001.json", lambda _: b""),
    "a flipped bit in a commit record": bytes_of("commits/00001.json", lambda content: flip(bytearray(content), 300)),
    "two commit records swapped": swapped_commits,
    "a missing manifest": missing_manifest,
    "a manifest cut short": bytes_of("manifest.parquet", lambda content: content[:-100]),
    "a manifest of an earlier snapshot": bytes_of(
        "manifest.parquet", lambda content: encode_manifest(decode_manifest(content).slice(0, 6))
    ),
    "a manifest of other rows": bytes_of("manifest.parquet", other_rows),
}

SEALED: dict[str, Damage] = {
    "a sample twice in a shard, sealed": sealed(lambda held: [*held, *held[:2]], lambda rows: [*rows, rows[0]]),
    "a sample of another unit, sealed": sample_of_another_unit,
    "a sample without tensors, sealed": sealed(without(1)),
    "a sample without its description, sealed": sealed(without(2)),
    "a sample that no commit names, sealed": sealed(rows=lambda rows: rows[:2]),
    "names that lead out of a shard, sealed": sealed(escaping),
    "a link that leads out of a shard, sealed": sealed(lambda held: [*held, ("link", b"")], kind=tarfile.SYMTYPE),
    "bytes after the end of a shard, sealed": sealed(tail=b"more"),
    "a pickle in place of tensors, sealed": sealed(with_tensors(as_pickle)),
    "a header of 2^63 bytes, sealed": sealed(with_tensors(with_header_of_2_to_63)),
    "a tensor left out, sealed": sealed(with_tensors(retensored(target=lambda _: None))),
    "a tensor of another shape, sealed": sealed(with_tensors(retensored(latent=lambda latent: latent[:, :2]))),
    "a tensor of another dtype, sealed": sealed(with_tensors(retensored(latent=lambda latent: latent.float()))),
    "fewer records than the commit states, sealed": sealed(
        with_tensors(retensored(**dict.fromkeys(
            ("latent", "target", "timestep", "guidance_cosine", "guidance_delta"), lambda value: value[:1]
        )))
    ),
    "another scale than the commit states, sealed": sealed(rows=lambda rows: [rows[0] | {"scale": 9.0}, *rows[1:]]),
    "an invalid description, sealed": sealed(lambda held: [(held[0][0], b"[" * 100_000), *held[1:]]),
}  # fmt: skip
