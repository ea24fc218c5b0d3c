"""What a word of the command line, or a value of a configuration file, means: a text as it stands, anything else as YAML.

YAML alone would change texts: `no`, `007`, `1e3`, `12:30`, and whatever comes after a `#`.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from stages.errors import UsageError

NONE = "null"  # by which a word leaves out a text that may be left out
QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*""")


class Plain(NamedTuple):
    """A value of YAML that is no text, as it stands and as it is read."""

    text: str
    value: Any


class Loader(yaml.SafeLoader):
    """Of values that no option's type makes texts: numbers are decimal, and no other word is one or a time."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
KINDS: dict[str, tuple[str, str]] = {  # the pattern, and the first characters
    "null": ("null|Null|NULL|~|", "nN~"),
    "bool": ("yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": ("[-+]?[0-9]+", "-+0123456789"),
    "float": (NUMBER, "-+0123456789."),
}


def _construct(loader: Loader, node: yaml.ScalarNode) -> Plain:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "int":
        return Plain(text, int(text) if len(text) < 400 else float("inf"))
    if kind == "float":
        return Plain(text, float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
    return Plain(text, None if kind == "null" else text.lower() in ("yes", "true", "on"))


for _name, (_pattern, _first) in KINDS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), [*_first])
    Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def read_yaml(content: bytes | str) -> Any:
    """The content of YAML, with `Plain` values in it.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(content, Loader=Loader)


def read_override(key: str, text: str, kind: Any) -> Any:
    """What a word `key=text` means for an option of that type.

    Raises:
        UsageError: it means nothing.
    """
    kinds = _alternatives(kind)
    is_list = text.startswith("[") and text.endswith("]") and any(get_origin(one) is list for one in kinds)
    if str in kinds and not is_list:
        return None if NoneType in kinds and text in (NONE, "") else as_text(key, text)
    if list[str] in kinds and is_list:
        return texts_of(key, text)
    try:
        return fitted(key, read_yaml(text), kind)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}={text}: not readable as key=value") from error


def as_text(key: str, text: str) -> str:
    """A text as it stands; a path below a home folder, as a shell that looks for it would write it."""
    if not text:
        raise UsageError(f"{key}=: empty: say {key}=...")
    return str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text


def texts_of(key: str, text: str) -> list[str]:
    """The texts between the brackets and commas of `[one, another]`; one in quotes may hold commas."""
    texts, rest = [], text[1:-1]
    while rest.strip():
        if (quoted := QUOTED.match(rest)) and rest[quoted.end() : quoted.end() + 1] in ("", ","):
            texts.append(str(yaml.safe_load(quoted[1])))
            rest = rest[quoted.end() + 1 :]
            continue
        one, _, rest = rest.partition(",")
        if not one.strip():
            raise UsageError(f"{key}={text}: nothing between two commas: leave one out")
        texts.append(one.strip())
    return texts


def fitted(key: str, value: Any, kind: Any = Any) -> Any:
    """A value of YAML for an option of that type: what is asked for as a text is one as it stands."""
    kinds = _alternatives(kind)
    if isinstance(value, Plain):
        is_text = str in kinds and value.value is not None
        return as_text(key, value.text) if is_text else value.value
    if isinstance(value, str):
        return as_text(key, value) if str in kinds and value else value
    if isinstance(value, list):
        inner = next((get_args(one)[0] for one in kinds if get_origin(one) is list), Any)
        return [item.text if inner is str and _is_override(item) else fitted(key, item, inner) for item in value]
    if isinstance(value, dict):
        named = {name.text if isinstance(name, Plain) else name: item for name, item in value.items()}
        return {name: fitted(f"{key}.{name}", item, _inner(kinds, name)) for name, item in named.items()}
    return value


def _is_override(value: Any) -> bool:
    return isinstance(value, Plain) and value.value is not None


def _inner(kinds: tuple[Any, ...], name: str) -> Any:
    """The type of what a dictionary, or a dataclass, has under a name."""
    for kind in kinds:
        if is_dataclass(kind):
            return get_type_hints(kind)[name] if name in {field.name for field in fields(kind)} else Any
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return Any


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
