"""Read prompts from a file or a bucket: known columns are parsed, other columns are ignored."""

from __future__ import annotations

import csv
import inspect
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from diffusers import ModularPipeline

from stages.base.columns import COLUMNS, LONGEST_NUMBER, TEXTS, decode_text
from stages.base.loading import first_line, located, resolve
from stages.base.pictures import PICTURES, PicturePath
from stages.base.sampling import Condition, takes_class_labels
from stages.base.size import Size
from stages.errors import UserError
from stages.storage.bucket import read_object

Row = dict[str, Any]
END_OF_LINE = re.compile(r"\r\n|\n|\r")
ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
LONGEST_SHOWN = 60  # characters of a value in an error
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_text(path: str) -> str:
    """The text of a file or an object, in UTF-8, without a byte-order mark.

    Invalid bytes become lone surrogates, so that they matter only in a column that is read.

    Raises:
        ValueError: its byte-order mark is that of another encoding.
    """
    content = read_bytes(path)
    if encoding := ENCODINGS.get(content[:2]):
        raise ValueError(f"it is {encoding}: save it as UTF-8")
    return decode_text(content)


def _lines(text: str) -> list[str]:
    """Split at line feeds and carriage returns alone; Unicode's other line separators belong to a prompt."""
    return END_OF_LINE.split(text)


def _rows_of_text(path: str) -> Iterator[Row]:
    for line in _lines(read_text(path)):
        if line.strip():
            yield {"prompt": line.strip()}


def _rows_of_json(path: str) -> Iterator[Row]:
    lines = (line for line in _lines(read_text(path)) if line.strip())
    for number, line in enumerate(lines, start=1):
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs, parse_int=_spelled)
        except RecursionError as error:
            raise ValueError(f"row {number}: nested too deep") from error
        except ValueError as error:
            raise ValueError(f"row {number}: {first_line(error)}: give one JSON object per line") from error
        if not isinstance(pairs, _Pairs):
            raise ValueError(f"row {number}: not a JSON object: give one per line")
        _check_once([name for name, _ in pairs], f"row {number}: ")
        yield dict(pairs)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as name-value pairs, so that a repeated name is noticed."""


def _spelled(digits: str) -> float:
    return int(digits) if len(digits) < LONGEST_NUMBER else math.inf


def _rows_of_csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    end = "\ud800"  # a row that no file holds; if it does not come back last, a quotation mark was left open
    table = csv.reader(io.StringIO(read_text(path).rstrip("\r\n") + f"\n{end}", newline=""))
    rows = [row for row in table if any(cell.strip() for cell in row)]
    if rows.pop() != [end]:
        raise ValueError("a quotation mark is opened and never closed: close it, or double it where it is meant")
    if not rows:
        return
    names = [name.strip() for name in rows[0]]
    if "prompt" not in names and len(names) == 1:
        _check_separator(names[0])
    _check_columns(names)
    for number, cells in enumerate(rows[1:], start=1):
        if any(cell.strip() for cell in cells[len(names) :]):
            raise ValueError(
                f"row {number}: {len(cells)} cells, where the first line names {len(names)} columns: "
                'put texts with commas into quotation marks ("...")'
            )
        named = zip(names, cells, strict=False)
        yield {name: cell for name, cell in named if name in TEXTS or cell.strip()}


def _check_separator(line: str) -> None:
    for separator, called in SEPARATORS.items():
        if separator in line and COLUMNS.keys() & {name.strip(' "') for name in line.split(separator)}:
            raise ValueError(f"its columns are separated by {called}: save it with commas")


def _rows_of_parquet(path: str) -> Iterator[Row]:
    file = pq.ParquetFile(io.BytesIO(read_bytes(path)))
    schema = file.schema_arrow
    _check_columns(schema.names)
    wanted = [name for name in COLUMNS if name in schema.names]
    for batch in file.iter_batches(columns=wanted):
        columns = {name: batch.column(name) for name in wanted if name in batch.schema.names}
        for i in range(len(batch)):
            yield {name: _entry(column, i) for name, column in columns.items()}


def _entry(column: pa.Array, i: int) -> Any:
    try:
        return column[i].as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)  # `text_of` refuses it and names the row


def _check_columns(names: list[str]) -> None:
    _check_once(names, "")
    if not {"prompt", *PICTURES} & set(names):
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"no column `prompt`; its columns are {shown}".encode(errors="replace").decode())


def _check_once(names: list[str], place: str) -> None:
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise ValueError(f"{place}{twice[0]} is there twice: leave one of them")
    for name in names:
        if name not in COLUMNS and (meant := name.strip().lower()) in COLUMNS:
            raise ValueError(f"{place}{name!r} would be ignored: write {meant}")


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".txt": _rows_of_text,
    ".jsonl": _rows_of_json,
    ".csv": _rows_of_csv,
    ".parquet": _rows_of_parquet,
}


def read_prompts(path: str) -> list[Condition]:
    """Rows with a `prompt` or input pictures (`image`, `mask_image`, `video`: paths), and optionally
    `negative_prompt`, `seed`, `guidance_scale`, `class_label`, `width`, `height`, `num_frames`; other columns are
    ignored.

    Raises:
        UserError: names the file, and the row that is wrong.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"prompts={path}: one of {', '.join(READERS)}")
    try:
        rows = list(READERS[suffix](path))
    except (OSError, ValueError, csv.Error, pa.ArrowException, obstore.exceptions.BaseError) as error:
        raise UserError(f"prompts={path}: not readable: {first_line(error)}") from error
    if not rows:
        raise UserError(f"prompts={path}: empty: name at least one prompt")
    # Absolute: workers may run elsewhere.
    folder = path.rpartition("/")[0] if "://" in path else str(Path(located(path)).parent)
    return [_checked(row, folder, f"prompts={path}: row {number}") for number, row in enumerate(rows, start=1)]


def _checked(row: Row, folder: str, named: str) -> Condition:
    condition: Condition = {}
    for name, read in COLUMNS.items():
        if (value := row.get(name)) is None:
            continue
        try:
            condition[name] = read(value)
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"{named}: {name}={value!r:.{LONGEST_SHOWN}}: {first_line(error)}") from error
    try:
        Size.from_columns(condition)
    except ValueError as error:
        raise UserError(f"{named}: {error}") from error
    pictures = [name for name in PICTURES if name in condition]
    if not condition.get("prompt", "").strip() and not pictures:
        raise UserError(f"{named}: has no prompt")
    return condition | {name: PicturePath(condition[name], folder) for name in pictures}


def check_columns(prompts: Sequence[Condition], named: str, kind: type | None) -> None:
    """Refuse columns that a pipeline does not take, and rows with other columns than the first.

    Args:
        named: the source of the prompts, for errors.
        kind: the pipeline's class; None where it is unknown.

    Raises:
        UserError: names the row, or the column.
    """
    has = {"prompt", *PICTURES} & prompts[0].keys()
    for number, prompt in enumerate(prompts, start=1):
        if differing := sorted(has ^ ({"prompt", *PICTURES} & prompt.keys())):
            lacking, having = (number, 1) if differing[0] in has else (1, number)
            raise UserError(
                f"{named}: row {lacking}: has no {differing[0]}, which row {having} has: give it to all or to none"
            )
    if kind is None or issubclass(kind, ModularPipeline):  # a modular pipeline's call names no arguments
        return
    if takes_class_labels(kind):
        raise UserError(f"{named}: {kind.__name__} takes classes, not prompts: say class_labels=all, a list, or a file")
    known = inspect.signature(kind.__call__).parameters
    if untaken := sorted(has - known.keys()):
        raise UserError(f"{named}: {kind.__name__} takes no {untaken[0]}: leave the column out")
    needed = {
        "prompt",
        *(name for name in PICTURES if name in known and known[name].default is inspect.Parameter.empty),
    }
    if missing := sorted(needed & known.keys() - has):
        raise UserError(f"{named}: {kind.__name__} needs a column {missing[0]}: give it one")


def read_bytes(path: str) -> bytes:
    """The content of a local file, or of an object in a bucket (`s3://`, `gs://`, `az://`).

    Endpoint and credentials come from the usual environment variables.
    """
    return read_object(path) if "://" in path else Path(resolve(path)).read_bytes()
