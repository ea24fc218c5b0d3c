"""Shards: WebDataset tars. Equal records make equal bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from stages.base.size import SIZE_KEYS
from stages.records.schema import TensorSpec
from stages.records.trajectory import Trajectory, tensor_specs
from stages.storage.folder import READ_SIZE


@dataclass(frozen=True)
class Sample:
    """A trajectory, or a part of one, as bytes.

    Attributes:
        members: contents by suffix, the tensors last.
        row: of the manifest, without the shard and the offset in it.
        tensors: dtype and shape of one record's tensors by name.
    """

    key: str
    members: dict[str, bytes]
    row: dict[str, Any]
    tensors: dict[str, TensorSpec]


def encode(trajectory: Trajectory) -> Sample:
    """Encode a trajectory as the bytes that a shard holds."""
    members = dict(sorted(trajectory.to_members().items()))
    return Sample(trajectory.key, members, row_of(trajectory, members["safetensors"]), tensor_specs(trajectory))


def write_shard(file: BinaryIO, samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Write samples; return their rows of the manifest, without the columns of the shard.

    Each row's `offset`, `size` and `checksum` (CRC-32) are those of the tensors' bytes inside the tar, so that a reader
    needs one read and no tar parser.
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
    """Yield (name, offset, content) of each member of a shard. No file is made by a member's name.

    Args:
        size: of the shard, in bytes.

    Raises:
        ValueError: the next bytes are not those of a shard.
    """
    offset = 0
    while (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        try:
            member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ValueError(f"no member at byte {offset}: {error}") from error
        offset += tarfile.BLOCKSIZE
        if member.type != tarfile.REGTYPE:
            raise ValueError(f"{member.name!r}, which is no file")
        if member.size < 0 or _padded(member.size) > size - offset:  # checked before memory is allocated
            raise ValueError(f"{member.name!r} of {member.size} bytes")
        yield member.name, offset, file.read(_padded(member.size))[: member.size]
        offset += _padded(member.size)
    while piece := file.read(READ_SIZE):
        if piece.strip(b"\0"):
            raise ValueError("bytes after its end")


def row_of(trajectory: Trajectory, tensors: bytes) -> dict[str, Any]:
    """Return a sample's row of the manifest, without its key and offset."""
    return {
        "size": len(tensors),
        "checksum": zlib.crc32(tensors),
        "trajectory": trajectory.index,
        "records": len(trajectory),
        "scale": trajectory.scale,
        "timestep_min": float(trajectory.timestep.min()),
        "timestep_max": float(trajectory.timestep.max()),
        "class_label": trajectory.condition.get("class_label"),
        "prompt": trajectory.condition.get("prompt"),
        "seed": trajectory.seed,
        "denoiser": trajectory.denoiser,
        **{key: trajectory.condition.get(key) for key in SIZE_KEYS},
    }


def hash_file(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of a file, read in pieces."""
    digest = hashlib.sha256()
    while piece := file.read(READ_SIZE):
        digest.update(piece)
    return digest.hexdigest()
