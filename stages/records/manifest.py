"""The manifest: one row per sample, the index, the checksums and the provenance of a dataset."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_OF_A_BATCH = 10_000  # as Python objects they take many times the memory
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
    ]
)

PLACE = (
    "shard",
    "shard_size",
    "shard_sha256",
    "offset",
)  # where a sample is, which another attempt at its unit changes


def unit_of(name: str) -> int:
    """The unit that a commit record's file, or a shard's, is named after."""
    return int(name.rpartition("/")[2].partition(".")[0].partition("-")[0])


def table_of(commits: Iterable[dict[str, Any]]) -> pa.Table:
    """The rows of all commits, in the order of the plan."""
    batches, rows = [], []
    for commit in commits:
        metadata = {"shard": commit["shard"], "shard_size": commit["size"], "shard_sha256": commit["sha256"]}
        rows += [metadata | row for row in commit["samples"]]
        if len(rows) >= ROWS_OF_A_BATCH:
            batches.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            rows = []
    batches.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return pa.Table.from_batches(batches, schema=SCHEMA)


def column_mismatch(column: str, values: Sequence[Any]) -> tuple[int, str] | None:
    """Which of a column's values a manifest cannot hold, and why; None if it can hold them all."""
    kind = SCHEMA.field(column).type
    try:
        pa.array(values, kind)
        return None
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        pass
    for place, value in enumerate(values):
        try:
            pa.array([value], kind)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError) as error:
            return place, " ".join(str(error).split())
    return None


def encode_manifest(table: pa.Table) -> bytes:
    """The manifest as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def decode_manifest(content: bytes) -> pa.Table:
    """The whole table; its columns are those of `SCHEMA`."""
    return pq.read_table(io.BytesIO(content), schema=SCHEMA)


def fingerprint(table: pa.Table) -> str:
    """SHA-256 of what the samples hold, unit by unit: the same for a dataset of which units were made again, bit for bit."""
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=ROWS_OF_A_BATCH):
        for row in batch.to_pylist():
            content = {name: value for name, value in row.items() if name not in PLACE}
            digest.update(json.dumps([unit_of(row["shard"]), content], sort_keys=True).encode())
    return digest.hexdigest()
