"""Run a command of this project as a subprocess, with its output in a log file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Started = Callable[[subprocess.Popen[bytes]], object]


class CommandResult(NamedTuple):
    """Whether a command succeeded, and the last line of its output."""

    succeeded: bool
    last_line: str


def run_command(
    command: str, overrides: list[str], log: Path, folder: Path, started: Started = lambda _: None, **environment: str
) -> CommandResult:
    """Run `python -m pipeline.COMMAND OVERRIDES` in `folder`; an interruption of this call terminates it.

    Args:
        log: file to which the output is appended.
        started: called with the process, so that another thread can terminate it.
        environment: variables in addition to those of this process.
    """
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", f"pipeline.{command}", *overrides],
            cwd=folder,
            env=os.environ
            | {"PYTHONUNBUFFERED": "1"}
            | environment,  # so that the log ends with the last line of output
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            started(process)
            status = process.wait(math.inf)  # with a timeout it polls, and so notices when Ray cancels the task
        finally:
            process.terminate()
            process.wait()
    with log.open("rb") as file:
        file.seek(start)
        line = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
    if status < 0:
        line = f"ended by signal {-status} after: {line}"
    return CommandResult(status == 0, line.removeprefix("error: "))
