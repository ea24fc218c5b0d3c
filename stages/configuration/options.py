"""Options of a configuration: a default, a help text, and bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf

from stages.errors import UsageError


def option(
    default: Any,
    meaning: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    one_of: Sequence[str] | None = None,
    kind: Any = None,
) -> Any:
    """Define a field of a configuration; a callable default creates a new value each time.

    Args:
        meaning: the help text.
        kind: the type to parse values by, if dataclass fields of OmegaConf cannot declare it.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "one_of": one_of}
    metadata = {"help": meaning, "kind": kind, **bounds}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def to_yaml(config: Any) -> str:
    """The resolved configuration in YAML, as saved with every output; `--config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def dotted(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their keys on a command line: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_bounds(config: Any) -> None:
    """Check every value against its option's bounds, all of which exclude NaN.

    Raises:
        UsageError: a value is out of bounds; names the key, the value and the bound.
    """
    for key, value, bounds in _bounded(config):
        for name, requirement, keeps in _BOUNDS:
            bound = bounds.get(name)
            if bound is not None and value is not None and not keeps(value, bound):
                raise UsageError(
                    f"{key}={value}: {requirement} {', '.join(bound) if name == 'one_of' else f'{bound:g}'}"
                )


_BOUNDS: list[tuple[str, str, Callable[[Any, Any], bool]]] = [
    ("at_least", "at least", lambda value, bound: value >= bound),
    ("above", "more than", lambda value, bound: value > bound),
    ("at_most", "at most", lambda value, bound: value <= bound),
    ("one_of", "one of", lambda value, bound: value in bound),
]


def _bounded(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from _bounded(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, entry.metadata
