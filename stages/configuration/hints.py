"""Ways out for what users mistype: a key, an argument with dashes, a value of another type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.configuration.overrides import NONE, NUMBER, is_nested

MUST_BE_A_LIST = "must be a list"
REQUIREMENTS = {  # by a part of OmegaConf's message
    "is not a ListConfig": MUST_BE_A_LIST,
    "could not be converted to Integer": "must be a whole number",
    "could not be converted to Float": "must be a number",
    "is not a valid bool": "must be true or false",
    "is not Optional": "must have a value",
    "to Dict[": "contains entries: say {key}.NAME=...",
}


def key_value_hint(override: str, names: Iterable[str]) -> str:
    """How to give an argument that is no `key=value`; many commands elsewhere take `--key value`, or paths alone."""
    if Path(override).exists():
        is_configuration = Path(override).suffix in (".yaml", ".yml")
        return (
            f"say --config {override}"
            if is_configuration
            else f"say what it is, such as {next(iter(names))}={override}"
        )
    name, _, value = override.lstrip("-").partition("=")
    key = name.replace("-", "_")
    if key not in names:
        return "give `--config FILE`, `--help` or `key=value`"
    return f"options are given without dashes: say {key}={value or '...'}"


def similar(key: str, names: Iterable[str]) -> list[str]:
    """The options that may be meant: by initials, such as `lr`, or by their words, such as `steps`, else by spelling."""
    words = {name: [word.removesuffix("s") for word in re.split("[._]", name)] for name in names}
    initials = [name for name in words if len(key) > 1 and "".join(word[:1] for word in words[name]).endswith(key)]
    named = [name for name in words if {word.removesuffix("s") for word in key.split("_")} <= set(words[name])]
    return list(dict.fromkeys(initials + named)) or difflib.get_close_matches(key, words, n=1, cutoff=0.5)


def requirement(key: str, message: str) -> str:
    """What a value must be, by OmegaConf's message; any other message as it is."""
    return next((must.format(key=key) for part, must in REQUIREMENTS.items() if part in message), message)


def shown(value: Any) -> str:
    """A value as it is given on a command line."""
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list) else NONE if value is None else str(value)


def list_hint(config: DictConfig, key: str, value: Any, kind: Any) -> str:
    """How to give a value as a list, if the option takes a list of such values; `64x64` and `64,64` are two numbers."""
    text = str(value)
    parts = text.split("x" if "x" in text else ",")
    are_numbers = all(re.fullmatch(NUMBER, part) for part in parts)
    items = parts if are_numbers else [value]
    try:
        OmegaConf.update(config, key, items)
    except OmegaConfBaseException:
        return ", such as [1,2]"
    if is_nested(kind):
        return f": say {key}={shown([items])}" if are_numbers else ", such as [[1,2]]"
    return f": say {key}={shown(items)}"
