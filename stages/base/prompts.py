"""Prompts from a file or a bucket: the columns that are known, each read as what it is; nothing else in a file matters."""

from __future__ import annotations

import csv
import inspect
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from diffusers import ModularPipeline

from stages.base.loading import first_line, resolve
from stages.base.pictures import PICTURES, PicturePath
from stages.base.sampling import Condition, takes_class_labels
from stages.errors import UserError
from stages.storage.bucket import read_object

Row = dict[str, Any]
MOST = 2**63 - 1  # what the manifest's columns hold
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)
LONGEST_NUMBER = 300  # digits: a number beyond it is out of every bound
EXACT = 2**53  # a float beyond it may have been another whole number
END_OF_LINE = re.compile(r"\r\n|\n|\r")
MARK = "\ufeff"
NO_CHARACTER = re.compile("[\ud800-\udfff]")  # bytes that were no UTF-8, halves of characters, and zeros
ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
LONGEST_SHOWN = 60  # characters of a value in an error
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = _decoded(value)
    if not isinstance(value, str):
        raise ValueError("not a text")
    if NO_CHARACTER.search(value):
        raise ValueError("not a text in UTF-8: save the file as UTF-8")
    return value


def _number(value: Any) -> float | int:
    """A number as it is, or as a text spells it: whole ones stay whole."""
    if isinstance(value, bytes):
        value = _decoded(value)
    if isinstance(value, str) and len(value) < LONGEST_NUMBER and NUMBER.fullmatch(spelled := value.strip()):
        value = int(spelled) if spelled.lstrip("+-").isdecimal() else float(spelled)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise ValueError("not a number")
    number: Any = value  # the protocols of numbers know no comparison
    whole = isinstance(number, (int, Decimal)) or abs(number) <= EXACT
    return int(number) if whole and math.isfinite(number) and number % 1 == 0 else float(number)


def _whole_number(value: Any) -> int:
    number = _number(value)
    if not isinstance(number, int):
        raise ValueError("not a whole number")
    if not 0 <= number <= MOST:
        raise ValueError(f"give one from 0 to {MOST}")
    return number


def _scale(value: Any) -> float:
    number = _number(value)
    if not math.isfinite(number):
        raise ValueError("give a finite scale")
    if number < 1:
        raise ValueError("scales below 1 are not guidance")
    return float(number)


COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "seed": _whole_number,
    "guidance_scale": _scale,
    "class_label": _whole_number,
    **dict.fromkeys(PICTURES, _text),
}
TEXTS = {"negative_prompt"}  # where an empty one is one


def _decoded(content: bytes) -> str:
    """Text of UTF-8, with or without a byte-order mark; what is none becomes halves of characters, which `_text` refuses."""
    return content.decode("utf-8", "surrogateescape").removeprefix(MARK).replace("\0", "\udc00")


def read_text(path: str) -> str:
    """The text of a file or an object, in UTF-8, without a byte-order mark.

    What is not UTF-8 is there as halves of characters: it is no fault of a file whose other parts are read.

    Raises:
        ValueError: it is marked as text in another encoding.
    """
    content = read_bytes(path)
    if encoding := ENCODINGS.get(content[:2]):
        raise ValueError(f"it is {encoding}: save it as UTF-8")
    return _decoded(content)


def _lines(text: str) -> list[str]:
    """The lines of a text: no other character ends one, whatever Unicode calls it."""
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
    """A JSON object as it stands, so that a name that comes twice is noticed."""


def _spelled(digits: str) -> float:
    return int(digits) if len(digits) < LONGEST_NUMBER else math.inf


def _rows_of_csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    end = "\ud800"  # a row that no file has: where it is missing, a quote was left open
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
        return bytes(error.object)  # which `_text` refuses by its row


def _check_columns(names: list[str]) -> None:
    _check_once(names, "")
    if not {"prompt", *PICTURES} & set(names):
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"no column `prompt`; its columns are {shown}".encode(errors="replace").decode())


def _check_once(names: list[str], place: str) -> None:
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise ValueError(f"{place}{twice[0]} is there twice: leave one of them")


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".txt": _rows_of_text,
    ".jsonl": _rows_of_json,
    ".csv": _rows_of_csv,
    ".parquet": _rows_of_parquet,
}


def read_prompts(path: str) -> list[Condition]:
    """Rows with a `prompt`, or what a picture is made of (`image`, `mask_image`, `video`: paths), and perhaps
    `negative_prompt`, `seed`, `guidance_scale`, `class_label`; other columns are not looked at.

    Raises:
        UserError: names the file, and the row where one is wrong.
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
    folder = path.rpartition("/")[0] if "://" in path else str(Path(resolve(path)).parent)
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
    pictures = [name for name in PICTURES if name in condition]
    if not condition.get("prompt", "").strip() and not pictures:
        raise UserError(f"{named}: has no prompt")
    return condition | {name: PicturePath(condition[name], folder) for name in pictures}


def check_columns(prompts: Sequence[Condition], named: str, kind: type | None) -> None:
    """Refuse rows that a pipeline does not take, or that are not alike in what they have.

    Args:
        kind: of the pipeline; None where it is not known.

    Raises:
        UserError: names the row, or the column.
    """
    has = {"prompt", *PICTURES} & prompts[0].keys()
    for number, prompt in enumerate(prompts, start=1):
        if differing := sorted(has ^ ({"prompt", *PICTURES} & prompt.keys())):
            here, there = (number, 1) if differing[0] in has else (1, number)
            raise UserError(
                f"{named}: row {here}: has no {differing[0]}, which row {there} has: give it to all or to none"
            )
    if kind is None or issubclass(kind, ModularPipeline):  # whose call names no argument
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
