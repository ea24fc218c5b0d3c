"""Prompts from a file or a bucket."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from stages.base import first_line, resolve
from stages.buckets import read_object
from stages.errors import UserError
from stages.sampling import Condition

COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "guidance_scale": float,
    "class_label": int,
}


def _lines(content: bytes) -> list[dict[str, Any]]:
    return [{"prompt": line.strip()} for line in content.decode().splitlines() if line.strip()]


def _rows(read: Callable[[Any], pa.Table]) -> Callable[[bytes], list[dict[str, Any]]]:
    return lambda content: read(io.BytesIO(content)).to_pylist()


READERS: dict[str, Callable[[bytes], list[dict[str, Any]]]] = {
    ".txt": _lines,
    ".jsonl": _rows(pa.json.read_json),
    ".csv": _rows(pa.csv.read_csv),
    ".parquet": _rows(pa.parquet.read_table),
}


def read_prompts(path: str) -> list[Condition]:
    """Rows with a `prompt` and perhaps `negative_prompt`, `seed`, `guidance_scale`, `class_label`; other columns are left out."""
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"prompts={path}: one of {', '.join(READERS)}")
    try:
        rows = READERS[suffix](read_bytes(path))
    except (OSError, ValueError, pa.ArrowException, obstore.exceptions.BaseError) as error:
        raise UserError(f"prompts={path}: not readable: {first_line(error)}") from error
    if not rows:
        raise UserError(f"prompts={path}: empty: name at least one prompt")
    return [_checked(row, f"prompts={path}: row {number}") for number, row in enumerate(rows, start=1)]


def _checked(row: dict[str, Any], named: str) -> Condition:
    if not str(row.get("prompt") or "").strip():
        raise UserError(f"{named}: has no prompt")
    told = {name: value for name, value in row.items() if name in COLUMNS and value is not None}
    try:
        condition = {name: COLUMNS[name](value) for name, value in told.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{named}: {first_line(error)}") from error
    if not 1 <= condition.get("guidance_scale", 1.0) < float("inf"):
        raise UserError(f"{named}: guidance_scale={condition['guidance_scale']}: scales below 1 are not guidance")
    if condition.get("seed", 0) < 0:
        raise UserError(f"{named}: seed={condition['seed']}: at least 0")
    return condition


def read_bytes(path: str) -> bytes:
    """The content of a local file, or of an object in a bucket (`s3://`, `gs://`, `az://`).

    Endpoint and credentials come from the usual environment variables.
    """
    return read_object(path) if "://" in path else Path(resolve(path)).read_bytes()
