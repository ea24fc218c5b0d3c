"""Shards: WebDataset tars that are the same to the byte whenever they hold the same records."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from stages.records.trajectory import Trajectory, tensor_specs
from stages.storage.folder import READ_SIZE


@dataclass(frozen=True)
class Sample:
    """A trajectory, or a part of one, as bytes.

    Attributes:
        members: by suffix, the tensors last.
        row: of the manifest, but for the shard and the place in it.
        tensors: dtype and shape of one record's tensors by name.
    """

    key: str
    members: dict[str, bytes]
    row: dict[str, Any]
    tensors: dict[str, dict[str, Any]]


def encode(trajectory: Trajectory) -> Sample:
    """The bytes that a shard will hold of it."""
    members = dict(sorted(trajectory.to_members().items()))
    return Sample(trajectory.key, members, row_of(trajectory, members["safetensors"]), tensor_specs(trajectory))


def write_shard(file: BinaryIO, samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Write samples and return their rows of the manifest, `shard` apart.

    Each row's `offset`, `size` and `checksum` (CRC-32) are of the tensors' bytes inside the tar, so that a reader takes
    them with one read and no tar parser.
    """
    rows = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            offset = tar.offset - _padded(len(content))
            rows.append({"key": sample.key, "offset": offset} | sample.row)
    return rows


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def read_members(file: BinaryIO, size: int) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset, content) of each member of a shard of so many bytes, from its first on; their names lead nowhere.

    Raises:
        ValueError: it is no shard from here on.
    """
    place = 0
    while (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        try:
            member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ValueError(f"no member at byte {place}: {error}") from error
        place += tarfile.BLOCKSIZE
        if member.type != tarfile.REGTYPE:
            raise ValueError(f"{member.name!r}, which is no file")
        if member.size < 0 or _padded(member.size) > size - place:  # before memory is taken for it
            raise ValueError(f"{member.name!r} of {member.size} bytes")
        yield member.name, place, file.read(_padded(member.size))[: member.size]
        place += _padded(member.size)
    while piece := file.read(READ_SIZE):
        if piece.strip(b"\0"):
            raise ValueError("bytes after its end")


def row_of(trajectory: Trajectory, tensors: bytes) -> dict[str, Any]:
    """A sample's row of the manifest, but for its key and the place in it."""
    return {
        "size": len(tensors),
        "checksum": zlib.crc32(tensors),
        "trajectory": trajectory.index,
        "records": len(trajectory),
        "scale": trajectory.guidance_scale,
        "timestep_min": float(trajectory.timestep.min()),
        "timestep_max": float(trajectory.timestep.max()),
        "class_label": trajectory.condition.get("class_label"),
        "prompt": trajectory.condition.get("prompt"),
        "seed": trajectory.seed,
        "denoiser": trajectory.denoiser,
    }


def hash_file(file: BinaryIO) -> str:
    """SHA-256 of what is left to read of a file, read in pieces."""
    digest = hashlib.sha256()
    while piece := file.read(READ_SIZE):
        digest.update(piece)
    return digest.hexdigest()
