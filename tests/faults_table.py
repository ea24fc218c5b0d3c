"""What the project survived in tests, a line of JSON each, where the environment variable FAULTS_TABLE names a file."""

from __future__ import annotations

import json
import os
from pathlib import Path


def survived(name: str, kind: str) -> None:
    """Note that a fault was injected and what was to survive it did."""
    if table := os.environ.get("FAULTS_TABLE"):
        with Path(table).open("a") as file:
            file.write(json.dumps({"fault": name, "kind": kind, "survived": True}) + "\n")
