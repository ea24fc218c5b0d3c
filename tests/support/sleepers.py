"""Commands that only sleep, so that tests can kill and interrupt them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("generate", "train", "evaluate")
SLEEP = """
import os, pathlib, time
print("begun")
pathlib.Path(f"{os.getpid()}.pid").touch()
time.sleep(60)
"""


def write_commands(folder: Path, code: str) -> None:
    """Write a stub for each command that runs in the folder."""
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "__init__.py").touch()
    for command in COMMANDS:
        (folder / "pipeline" / f"{command}.py").write_text(code)


def write_sleepers(folder: Path) -> None:
    """Write commands that sleep after each has written a file named by its process."""
    write_commands(folder, SLEEP)


def as_soon_as_they_sleep(folder: Path, number: int, act: Callable[[int], None]) -> None:
    """Call `act` with the id of one of the processes, once the given number of them sleep in the folder."""

    def watch() -> None:
        while len(found := list(folder.glob("*.pid"))) < number:
            time.sleep(0.05)
        act(int(found[0].stem))

    threading.Thread(target=watch, daemon=True).start()
