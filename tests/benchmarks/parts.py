"""Run the parts of a long measurement one after the other, each in its own process, and write one JSON file.

All parts share one time limit. A part that fails, dies or runs out of time keeps the rows that it had sent, and the
others continue.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DONE = "done"
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some rows of the file.

    Attributes:
        limit: in seconds.
        work, arguments: the function that yields the rows, and its arguments.
    """

    name: str
    limit: float
    work: Callable[..., Iterator[Row]]
    arguments: tuple[Any, ...] = ()


class Child:
    """The process of a part.

    It loads its modules at once and then waits for a start signal, so that loading does not count as the part's time.
    """

    def __init__(self, part: Part) -> None:
        self.rows, remote = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=carry_out, args=(part, remote))
        self.process.start()
        remote.close()

    def result(self, limit: float) -> Row:
        """Return the rows, the seconds, and the error that ended the part early, if any."""
        start, rows, error = time.monotonic(), [], None
        try:
            self.rows.send("begin")
            while True:
                left = start + limit - time.monotonic()
                if left <= 0 or not self.rows.poll(left):
                    error = f"stopped after {limit:.0f} s"
                    break
                message = self.rows.recv()
                if message == DONE:
                    break
                if isinstance(message, str):
                    error = message
                    break
                rows.append(message)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            error = f"its process ended with status {self.process.exitcode}"
        finally:
            self.stop()
        return {"seconds": round(time.monotonic() - start, 1), "rows": rows, "error": error}

    def stop(self) -> None:
        """Kill the process and its children, such as compilers."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it has no process group before it starts
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def carry_out(part: Part, connection: Connection) -> None:
    """Run a part in its own process: send its rows, then `DONE` or the error."""
    os.setsid()
    connection.recv()
    try:
        for row in part.work(*part.arguments):
            connection.send(row)
        connection.send(DONE)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}"[:500])
        raise


def run(file: Path, seconds: float, chosen: list[Part]) -> Row:
    """Run all parts within this many seconds, and write their rows."""
    end = time.monotonic() + seconds
    result: Row = {"parts": {}}
    waiting = [Child(chosen[0])]
    try:
        for i, part in enumerate(chosen):
            child = waiting.pop()
            if part is not chosen[-1]:
                waiting.append(Child(chosen[i + 1]))
            result["parts"][part.name] = child.result(min(part.limit, max(0.0, end - time.monotonic())))
            result["seconds"] = round(seconds - (end - time.monotonic()), 1)
            file.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        for child in waiting:
            child.stop()
    return result
