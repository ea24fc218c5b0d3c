"""The manifest: one row per sample, with its place, its checksum and its provenance."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.base.size import SIZE_KEYS
from stages.records.schema import Commit

ROWS_PER_BATCH = 10_000  # rows take many times the memory as Python objects
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_size", pa.int64(), nullable=False),
        pa.field("shard_sha256", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("checksum", pa.uint32(), nullable=False),
        pa.field("trajectory", pa.int64(), nullable=False),
        pa.field("records", pa.int64(), nullable=False),
        pa.field("scale", pa.float64(), nullable=False),
        pa.field("timestep_min", pa.float64(), nullable=False),
        pa.field("timestep_max", pa.float64(), nullable=False),
        pa.field("class_label", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("denoiser", pa.string(), nullable=False),
        *(pa.field(key, pa.int64()) for key in SIZE_KEYS),
    ]
)

LOCATION = ("shard", "shard_size", "shard_sha256", "offset")  # differs between attempts at a unit


def unit_of(name: str) -> int:
    """Return the unit in the name of a shard or a commit record."""
    return int(name.rpartition("/")[2].partition(".")[0].partition("-")[0])


def table_of(commits: Iterable[Commit]) -> pa.Table:
    """Return the rows of all commits, in their order."""
    batches, rows = [], []
    for commit in commits:
        shard = {"shard": commit.shard, "shard_size": commit.size, "shard_sha256": commit.sha256}
        rows += [shard | row for row in commit.samples]
        if len(rows) >= ROWS_PER_BATCH:
            batches.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            rows = []
    batches.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return pa.Table.from_batches(batches, schema=SCHEMA)


def column_mismatch(column: str, values: Sequence[Any]) -> tuple[int, str] | None:
    """Find the first value that a column cannot hold: (its index, the reason); None if it can hold them all."""
    kind = SCHEMA.field(column).type
    try:
        pa.array(values, kind)
        return None
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        pass
    for index, value in enumerate(values):
        try:
            pa.array([value], kind)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError) as error:
            return index, " ".join(str(error).split())
    return None


def encode_manifest(table: pa.Table) -> bytes:
    """Encode the manifest as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def decode_manifest(content: bytes) -> pa.Table:
    """Decode a Parquet file to a table with the columns of `SCHEMA`."""
    return pq.read_table(io.BytesIO(content), schema=SCHEMA)


def fingerprint(table: pa.Table) -> str:
    """Return the SHA-256 of what the samples hold. Units that are made again bit for bit do not change it."""
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH):
        for row in batch.to_pylist():
            content = {name: value for name, value in row.items() if name not in LOCATION}
            digest.update(json.dumps([unit_of(row["shard"]), content], sort_keys=True).encode())
    return digest.hexdigest()
