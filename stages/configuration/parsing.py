"""A configuration from files and `key=value` words, checked key by key, and the help that lists its keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.configuration.overrides import Plain, fitted, read_override, read_yaml
from stages.errors import UsageError

Config = TypeVar("Config")
Layer = list[tuple[str, Any]]  # options and their values, from one place


def parse(config_class: type[Config], overrides: list[str]) -> Config:
    """The defaults of `config_class`, then the file after `--config`, then each `key=value`, checked key by key.

    Raises:
        UsageError: an unknown key, a value of another type, a missing one, or a file that cannot be read.
    """
    known = {name: kind for name, kind, *_ in options(config_class)}
    files, overrides = files_and_overrides(overrides)
    layers = [read_file(Path(file), known) for file in files] + [override_of(override, known) for override in overrides]
    config = OmegaConf.structured(config_class)
    for layer in layers:
        merge(config, layer, known)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise UsageError(f"{missing[0]}: not given: say {missing[0]}=...")
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, config_class)
    return result


def files_and_overrides(overrides: list[str]) -> tuple[list[str], list[str]]:
    """What follows each `--config`, and the other words."""
    files, overrides = [], list(overrides)
    while "--config" in overrides:
        place = overrides.index("--config")
        if place + 1 == len(overrides):
            raise UsageError("--config: name a YAML file after it")
        files.append(overrides[place + 1])
        del overrides[place : place + 2]
    return files, overrides


def read_file(path: Path, known: Mapping[str, Any]) -> Layer:
    """The options that a YAML file tells.

    Args:
        known: the options' types.
    """
    try:
        content = read_yaml(path.expanduser().read_bytes())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if content is None or (isinstance(content, Plain) and content.value is None):
        return []
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: holds no keys")
    return list(leaves(content, known))


def leaves(content: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values, going no deeper than the keys that are known."""
    for key, value in content.items():
        name = f"{prefix}{key.text if isinstance(key, Plain) else key}"
        if isinstance(value, dict) and name not in known:
            yield from leaves(value, known, f"{name}.")
        else:
            yield name, fitted(name, value, known.get(name, Any))


def override_of(override: str, known: Mapping[str, Any]) -> Layer:
    """The option that a word tells; below one that holds keys of the user's, such as `teacher.call`, the key and its value."""
    if "=" not in override or override.startswith("-"):
        raise UsageError(f"{override}: not understood: options are `--config FILE`, `--help` and `key=value`")
    key, text = override.split("=", 1)
    owner = key
    while owner not in known and "." in owner:
        owner = owner.rpartition(".")[0]
    if owner == key or owner not in known:
        return [(key, read_override(key, text, known.get(key, Any)))]
    value = read_override(key, text, str if ".env_vars." in key else Any)
    for name in reversed(key.removeprefix(f"{owner}.").split(".")):
        value = {name: value}
    return [(owner, value)]


def merge(config: DictConfig, layer: Layer, known: Mapping[str, Any]) -> None:
    """Merge one layer, a key at a time, so that an error names its key."""
    for key, value in layer:
        if key not in known:
            if any(name.startswith(f"{key}.") for name in known):
                raise UsageError(f"{key}: holds keys of its own: say {key}.NAME=..., --help lists them")
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else ": --help lists the keys"
            raise UsageError(f"{key}: no such key{hint}")
        try:
            OmegaConf.update(config, key, value)
            OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            message = str(error).splitlines()[0]
            within = error.full_key if str(error.full_key).startswith(f"{key}.") else None
            if "is not a ListConfig" in message:
                message = "a list is asked for" if within else f"a list is asked for: say {key}=[{value}]"
            raise UsageError(f"{within or f'{key}={value}'}: {message}") from error


def options(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, type, default, meaning) of every option of a dataclass and of those inside it."""
    kinds = get_type_hints(config_class)
    for option in fields(config_class):
        kind = kinds[option.name]
        if is_dataclass(kind):
            yield from options(kind, f"{prefix}{option.name}.")
        else:
            default = option.default_factory() if callable(option.default_factory) else option.default
            metadata = option.metadata
            yield prefix + option.name, metadata.get("kind") or kind, default, metadata.get("help", "")


def help_text(config_class: type[Any], description: str) -> str:
    lines = [description, "", "usage: --config FILE key=value ...", ""]
    for key, kind, default, meaning in options(config_class):
        name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        shown = "required" if default == MISSING else f"default {default}"
        lines.append(f"  {key}  ({name.replace('typing.', '')}, {shown})\n      {meaning}")
    return "\n".join(lines)
