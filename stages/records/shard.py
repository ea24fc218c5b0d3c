"""Shards: WebDataset tars that are the same to the byte whenever they hold the same records."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

from stages.records.folder import READ_SIZE
from stages.records.record import Trajectory


def write_shard(file: BinaryIO, trajectories: Iterable[Trajectory]) -> list[dict[str, Any]]:
    """Write one sample per trajectory and return their rows of the manifest, `shard` apart.

    Each row's `offset`, `size` and `checksum` (CRC-32) are of the tensors' bytes inside the tar, so that a reader takes
    them with one read and no tar parser.
    """
    rows = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for trajectory in trajectories:
            for suffix, content in sorted(trajectory.to_members().items()):
                member = tarfile.TarInfo(f"{trajectory.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            rows.append(_row(trajectory, content, offset=tar.offset - _padded(len(content))))
    return rows


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _row(trajectory: Trajectory, tensors: bytes, offset: int) -> dict[str, Any]:
    return {
        "key": trajectory.key,
        "offset": offset,
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
    }


def hash_file(file: BinaryIO) -> str:
    """SHA-256 of what is left to read of a file, read in pieces."""
    digest = hashlib.sha256()
    while piece := file.read(READ_SIZE):
        digest.update(piece)
    return digest.hexdigest()
