"""A command of this project as a process of its own, with what it says kept in a log."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Started = Callable[[subprocess.Popen[bytes]], object]


class Ended(NamedTuple):
    """How a process ended: whether well, and the last line that it said."""

    done: bool
    line: str


def run_child(
    command: str, overrides: list[str], log: Path, here: Path, started: Started = lambda _: None, **environment: str
) -> Ended:
    """Run `python -m pipeline.COMMAND WORDS` in the folder `here`; it ends when this call is interrupted.

    Args:
        log: what it says is added here.
        started: is handed the process, for who waits in another thread to end it.
        environment: variables besides our own.
    """
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", f"pipeline.{command}", *overrides],
            cwd=here,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,  # so that the log's last line was said last
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            started(process)
            status = process.wait(math.inf)  # with a limit it wakes up now and then, and notices that Ray cancels it
        finally:
            process.terminate()
            process.wait()
    with log.open("rb") as file:
        file.seek(start)
        line = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
    if status < 0:
        line = f"ended by signal {-status} after: {line}"
    return Ended(status == 0, line.removeprefix("error: "))
