"""The places of files as readers elsewhere see them: what is published names no place on its author's machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.base.loading import PROJECT_ROOT, resolve
from stages.base.single_file import is_single_file
from stages.storage.hub import REPOSITORY

PACKAGE = "adapter-guidance-distillation"
SHIPPED = "stages/embedded/"


def public(place: str) -> str:
    """The last name of a path that leads through this machine's folders, and of a shipped file its path in the package.

    A relative path, a hub id and an address stay as they are.
    """
    local = place.removeprefix("file://")
    path = Path(local)
    if "://" in local or not (path.is_absolute() or ".." in path.parts or path.parts[:1] == ("~",)):
        return place
    if path.is_relative_to(PROJECT_ROOT / SHIPPED):
        return path.relative_to(PROJECT_ROOT).as_posix()
    return path.name or place


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """JSON in which each string is changed, but no key."""
    if isinstance(value, dict):
        return {key: map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_strings(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def is_on_hub(name_or_path: str) -> bool:
    """Whether a model's name is that of a repository on a hub, and of no folder here."""
    return REPOSITORY.fullmatch(name_or_path) is not None and not Path(resolve(name_or_path)).exists()


def is_shipped(name_or_path: str) -> bool:
    return public(name_or_path).startswith(SHIPPED)


def short_name(name_or_path: str) -> str:
    """The id on the hub, or the name of the folder or file."""
    return name_or_path if is_on_hub(name_or_path) else Path(name_or_path).name


def whereabouts(name_or_path: str) -> str:
    """A model's name and where its weights are, for a card."""
    if is_on_hub(name_or_path):
        return name_or_path
    if is_shipped(name_or_path):
        return f"{short_name(name_or_path)}, which ships with the Python package {PACKAGE}: {public(name_or_path)}"
    kind = "file" if is_single_file(name_or_path) else "folder"
    return f"{short_name(name_or_path)}, a local {kind} of its author: its weights are not on the hub"
