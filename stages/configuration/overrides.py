"""Convert values from the command line and from files by the type of their option: strings verbatim, others as YAML.

YAML alone would change strings such as `no`, `007`, `1e3` and `12:30`, and cut them at a `#`.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from stages.errors import UsageError

NONE = "null"  # sets an optional string to None
QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*""")


class Scalar(NamedTuple):
    """An unquoted YAML scalar that is not a string: its text and its value."""

    text: str
    value: Any


class Loader(yaml.SafeLoader):
    """A YAML loader with decimal numbers only: no octal, hexadecimal or sexagesimal numbers, no dates."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
KINDS: dict[str, tuple[str, str]] = {  # pattern and possible first characters
    "null": ("null|Null|NULL|~|", "nN~"),
    "bool": ("yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": ("[-+]?[0-9]+", "-+0123456789"),
    "float": (NUMBER, "-+0123456789."),
}


def _construct(loader: Loader, node: yaml.ScalarNode) -> Scalar:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "int":
        return Scalar(text, int(text) if len(text) < 400 else float("inf"))
    if kind == "float":
        return Scalar(text, float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
    return Scalar(text, None if kind == "null" else text.lower() in ("yes", "true", "on"))


for _name, (_pattern, _first) in KINDS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), [*_first])
    Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def read_yaml(content: bytes | str) -> Any:
    """Load YAML; scalars that are not strings become `Scalar`.

    Raises:
        yaml.YAMLError: the content is not YAML.
    """
    return yaml.load(content, Loader=Loader)


def read_override(key: str, text: str, kind: Any) -> Any:
    """Convert the text of `key=text` to an option's type.

    Raises:
        UsageError: the text cannot be converted.
    """
    kinds = _alternatives(kind)
    is_list = text.startswith("[") and text.endswith("]") and any(get_origin(one) is list for one in kinds)
    if str in kinds and not is_list:
        return None if NoneType in kinds and text in (NONE, "") else to_string(key, text)
    if list[str] in kinds and is_list:
        return to_strings(key, text)
    try:
        return convert(key, read_yaml(text), kind)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}={text}: not readable as key=value") from error


def to_string(key: str, text: str) -> str:
    """The text verbatim, except that a leading `~` becomes the home folder."""
    if not text:
        raise UsageError(f"{key}=: empty: say {key}=...")
    return str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text


def to_strings(key: str, text: str) -> list[str]:
    """The strings of a list such as `[one, another]`; a quoted one may contain commas."""
    texts, rest = [], text[1:-1]
    while rest.strip():
        if (quoted := QUOTED.match(rest)) and rest[quoted.end() : quoted.end() + 1] in ("", ","):
            texts.append(str(yaml.safe_load(quoted[1])))
            rest = rest[quoted.end() + 1 :]
            continue
        one, _, rest = rest.partition(",")
        if not one.strip():
            raise UsageError(f"{key}={text}: nothing between two commas: remove one")
        texts.append(one.strip())
    return texts


def convert(key: str, value: Any, kind: Any = Any) -> Any:
    """Convert a YAML value to an option's type; a string option takes a scalar's text verbatim."""
    kinds = _alternatives(kind)
    if isinstance(value, Scalar):
        is_string = str in kinds and value.value is not None
        return to_string(key, value.text) if is_string else value.value
    if isinstance(value, str):
        return to_string(key, value) if str in kinds and value else value
    if isinstance(value, list):
        inner = next((get_args(one)[0] for one in kinds if get_origin(one) is list), Any)
        return [item.text if inner is str and _is_scalar(item) else convert(key, item, inner) for item in value]
    if isinstance(value, dict):
        named = {name.text if isinstance(name, Scalar) else name: item for name, item in value.items()}
        return {name: convert(f"{key}.{name}", item, _inner(kinds, name)) for name, item in named.items()}
    return value


def is_nested(kind: Any) -> bool:
    """Whether a type is that of a list of lists."""
    return any(get_origin(one) is list and get_origin(get_args(one)[0]) is list for one in _alternatives(kind))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Scalar) and value.value is not None


def _inner(kinds: tuple[Any, ...], name: str) -> Any:
    """The type of an entry of a dictionary or a dataclass."""
    for kind in kinds:
        if is_dataclass(kind):
            return get_type_hints(kind)[name] if name in {field.name for field in fields(kind)} else Any
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return Any


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
