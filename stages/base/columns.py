"""The columns of a file of prompts, and the parser of each column's values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import Any

from stages.base.pictures import PICTURES
from stages.base.size import SIZE_KEYS

MOST = 2**63 - 1  # the largest integer in a column of the manifest
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)
LONGEST_NUMBER = 300  # digits; a longer number is out of every bound
EXACT = 2**53  # larger floats may be rounded integers
MARK = "\ufeff"
NO_CHARACTER = re.compile("[\ud800-\udfff]")  # stands for invalid UTF-8, lone surrogates and zero bytes


def decode_text(content: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark; `text_of` refuses the surrogates of invalid bytes."""
    return content.decode("utf-8", "surrogateescape").removeprefix(MARK).replace("\0", "\udc00")


def text_of(value: Any) -> str:
    if isinstance(value, bytes):
        value = decode_text(value)
    if not isinstance(value, str):
        raise ValueError("not a text")
    if NO_CHARACTER.search(value):
        raise ValueError("not a text in UTF-8: save the file as UTF-8")
    return value


def number_of(value: Any) -> float | int:
    """A number, or the number that a text spells; whole numbers stay int."""
    if isinstance(value, bytes):
        value = decode_text(value)
    if isinstance(value, str) and len(value) < LONGEST_NUMBER and NUMBER.fullmatch(spelled := value.strip()):
        value = int(spelled) if spelled.lstrip("+-").isdecimal() else float(spelled)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise ValueError("not a number")
    number: Any = value  # the numeric protocols lack comparisons
    whole = isinstance(number, (int, Decimal)) or abs(number) <= EXACT
    return int(number) if whole and math.isfinite(number) and number % 1 == 0 else float(number)


def whole_number_of(value: Any) -> int:
    number = number_of(value)
    if not isinstance(number, int):
        raise ValueError("not a whole number")
    if not 0 <= number <= MOST:
        raise ValueError(f"give one from 0 to {MOST}")
    return number


def scale_of(value: Any) -> float:
    number = number_of(value)
    if not math.isfinite(number):
        raise ValueError("give a finite scale")
    if number < 1:
        raise ValueError("scales below 1 are not guidance")
    return float(number)


COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": text_of,
    "negative_prompt": text_of,
    "seed": whole_number_of,
    "guidance_scale": scale_of,
    "class_label": whole_number_of,
    **dict.fromkeys(SIZE_KEYS, whole_number_of),
    **dict.fromkeys(PICTURES, text_of),
}
TEXTS = {"negative_prompt"}  # columns in which an empty text counts as a value
