"""Parse a configuration from files and `key=value` overrides, and print its help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.configuration.hints import MUST_BE_A_LIST, key_value_hint, list_hint, requirement, shown, similar
from stages.configuration.overrides import Scalar, convert, read_override, read_yaml
from stages.errors import UsageError

Config = TypeVar("Config")
Layer = list[tuple[str, Any]]  # options and values from one source


def parse(config_class: type[Config], overrides: list[str]) -> Config:
    """Create a configuration: the defaults, overridden by the files after `--config`, then by each `key=value`.

    Raises:
        UsageError: an unknown key, a value of the wrong type, a missing value, or an unreadable file.
    """
    types = {name: kind for name, kind, *_ in options(config_class)}
    files, overrides = files_and_overrides(overrides)
    layers = [read_file(Path(file), types) for file in files] + [override_of(override, types) for override in overrides]
    config = OmegaConf.structured(config_class)
    for layer in layers:
        merge(config, layer, types)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise UsageError(f"{missing[0]}: not given: say {missing[0]}=...")
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, config_class)
    return result


def files_and_overrides(overrides: list[str]) -> tuple[list[str], list[str]]:
    """The files after each `--config`, and the other arguments."""
    files, overrides = [], [part for one in overrides for part in split_off_file(one)]
    while "--config" in overrides:
        index = overrides.index("--config")
        if index + 1 == len(overrides):
            raise UsageError("--config: name a YAML file after it")
        files.append(overrides[index + 1])
        del overrides[index : index + 2]
    return files, overrides


def split_off_file(override: str) -> list[str]:
    """`--config=FILE` as the two words `--config FILE`."""
    return override.split("=", 1) if override.startswith("--config=") else [override]


def read_file(path: Path, types: Mapping[str, Any]) -> Layer:
    """Read the options in a YAML file.

    Args:
        types: the options' types, by dotted key.
    """
    try:
        content = read_yaml(path.expanduser().read_bytes())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if content is None or (isinstance(content, Scalar) and content.value is None):
        return []
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: contains no keys")
    return list(leaves(content, types))


def leaves(content: Mapping[Any, Any], types: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested keys into dotted keys, down to the keys of options."""
    for key, value in content.items():
        name = f"{prefix}{key.text if isinstance(key, Scalar) else key}"
        if isinstance(value, dict) and name not in types:
            yield from leaves(value, types, f"{name}.")
        else:
            yield name, convert(name, value, types.get(name, Any))


def override_of(override: str, types: Mapping[str, Any]) -> Layer:
    """Read `key=value`; a key below a dictionary option, such as `teacher.call.NAME`, sets that entry."""
    if "=" not in override or override.startswith(("-", "=")):
        raise UsageError(f"{override}: not understood: {key_value_hint(override, types)}")
    key, text = override.split("=", 1)
    owner = key
    while owner not in types and "." in owner:
        owner = owner.rpartition(".")[0]
    if owner == key or owner not in types:
        return [(key, read_override(key, text, types.get(key, Any)))]
    value = read_override(key, text, str if ".env_vars." in key else Any)
    for name in reversed(key.removeprefix(f"{owner}.").split(".")):
        value = {name: value}
    return [(owner, value)]


def merge(config: DictConfig, layer: Layer, types: Mapping[str, Any]) -> None:
    """Merge one layer, key by key, so that an error names its key."""
    for key, value in layer:
        if key not in types:
            if any(name.startswith(f"{key}.") for name in types):
                raise UsageError(f"{key}: contains other keys: say {key}.NAME=..., --help lists them")
            near = similar(key, types)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the keys"
            raise UsageError(f"{key}: no such key: {hint}")
        try:
            OmegaConf.update(config, key, value)
            OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            message = requirement(key, str(error).splitlines()[0])
            within = error.full_key if str(error.full_key).startswith(f"{key}.") else None
            if message == MUST_BE_A_LIST and not within:
                message += list_hint(config, key, value, types[key])
            raise UsageError(f"{within or f'{key}={shown(value)}'}: {message}") from error


def options(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted key, type, default, help text) for every option of a dataclass, including nested ones."""
    kinds = get_type_hints(config_class)
    for option in fields(config_class):
        kind = kinds[option.name]
        if is_dataclass(kind):
            yield from options(kind, f"{prefix}{option.name}.")
        else:
            default = option.default_factory() if callable(option.default_factory) else option.default
            metadata = option.metadata
            yield prefix + option.name, metadata.get("kind") or kind, default, metadata.get("help", "")


def help_text(config_class: type[Any], description: str, flags: Sequence[str] = ()) -> str:
    """
    Args:
        flags: of the command, besides `--help` and `--config`; each of them stands alone.
    """
    modes = f"[{' | '.join(flags)}] " if flags else ""
    lines = [description, "", f"usage: {modes}[--config FILE] key=value ...", ""]
    for key, kind, default, meaning in options(config_class):
        name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        shown = "required" if default == MISSING else f"default {default}"
        lines.append(f"  {key}  ({name.replace('typing.', '')}, {shown})\n      {meaning}")
    return "\n".join(lines)
