"""Frozen dataclasses from JSON: each value is checked against the type of its field."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Fields = TypeVar("Fields")


class FieldError(ValueError):
    """A key that is missing, or holds a value of another type."""


def read_fields(kind: type[Fields], value: Any, name: str = "") -> Fields:
    """Build a dataclass from a JSON object; keys without a field are ignored.

    The types of fields are `Any`, `str`, `bool`, `int`, `float`, dataclasses, `list[T]`, `tuple[T, ...]` and
    `dict[str, T]` of these, and `T | None`. A dataclass with a `from_json(value, name)` reads itself. Numbers are not
    converted, so that a value that is written again has the same digest.

    Args:
        name: the key that holds the object, for the message.

    Raises:
        FieldError: names the key that is missing or holds another type.
    """
    if not isinstance(value, dict):
        raise FieldError(f"{name or 'the content'} is no object")
    own: Any = kind  # mypy takes no `type[Fields]` for hashable
    given = {}
    for key, type_ in _types_of(own).items():
        path = f"{name}.{key}" if name else key
        if key in value:
            given[key] = _checked(type_, value[key], path)
        elif key in _required(own):
            raise FieldError(f"no {path}")
    return kind(**given)


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _required(kind: Any) -> set[str]:
    """Return the names of the fields without a default."""
    return {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}


@cache
def _parts_of(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return `(list, (int,))` for `list[int]`."""
    return get_origin(kind) or kind, get_args(kind)


def _checked(kind: Any, value: Any, name: str) -> Any:
    """Return the value, with dataclasses for objects and tuples for lists as the type says."""
    origin, inner = _parts_of(kind)
    if NoneType in inner:
        return None if value is None else _checked(inner[0], value, name)
    if origin is dict and inner[1] is not Any and type(value) is dict:
        return {key: _checked(inner[1], each, f"{name}.{key}") for key, each in value.items()}
    if origin in (list, tuple) and type(value) is list:
        return origin(_checked(inner[0], each, f"{name}[{index}]") for index, each in enumerate(value))
    in_json = list if origin is tuple else origin
    if kind is Any or type(value) is in_json or (type(value), in_json) == (int, float):
        return value
    if isinstance(origin, type) and is_dataclass(origin):
        return getattr(origin, "from_json", partial(read_fields, origin))(value, name)
    raise FieldError(f"{name} is {type(value).__name__}, not {in_json.__name__}")
