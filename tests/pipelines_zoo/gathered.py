"""All specimens: the ZOO of every file in this folder."""

from __future__ import annotations

import importlib
import pkgutil

import tests.pipelines_zoo
from tests.pipelines_zoo.specimen import Specimen


def gather() -> dict[str, Specimen]:
    """Return the specimens by name; no two files may share a name."""
    found: dict[str, Specimen] = {}
    for module in pkgutil.iter_modules(tests.pipelines_zoo.__path__):
        if module.name.startswith("test_"):
            continue
        zoo = getattr(importlib.import_module(f"tests.pipelines_zoo.{module.name}"), "ZOO", {})
        assert not found.keys() & zoo.keys(), f"in two files: {found.keys() & zoo.keys()}"
        found |= zoo
    return found
