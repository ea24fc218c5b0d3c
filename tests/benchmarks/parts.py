"""Parts of a long measurement, one behind the other in processes of their own, within one time and into one JSON file.

A part that fails, dies or runs out of its time keeps the rows that it had told by then, and the others go on.
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
        limit: seconds that it may take; work, arguments: what gives the rows.
    """

    name: str
    limit: float
    work: Callable[..., Iterator[Row]]
    arguments: tuple[Any, ...] = ()


class Child:
    """The process of a part. It loads its modules at once, and begins when it is told to, so that loading costs no time of its own."""

    def __init__(self, part: Part) -> None:
        self.rows, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=carry_out, args=(part, theirs))
        self.process.start()
        theirs.close()

    def result(self, limit: float) -> Row:
        """Its rows, the seconds it took, and what ended it before its end, if anything did."""
        start, rows, error = time.monotonic(), [], None
        try:
            self.rows.send("begin")
            while True:
                left = start + limit - time.monotonic()
                if left <= 0 or not self.rows.poll(left):
                    error = f"stopped after {limit:.0f} s"
                    break
                info = self.rows.recv()
                if info == DONE:
                    break
                if isinstance(info, str):
                    error = info
                    break
                rows.append(info)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            error = f"its process ended with status {self.process.exitcode}"
        finally:
            self.stop()
        return {"seconds": round(time.monotonic() - start, 1), "rows": rows, "error": error}

    def stop(self) -> None:
        """End it with all that it started: compilers."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it has no group of its own before it begins
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def carry_out(part: Part, info: Connection) -> None:
    """In the process of a part: send its rows, and at the end a word: `DONE`, or what went wrong."""
    os.setsid()
    info.recv()
    try:
        for row in part.work(*part.arguments):
            info.send(row)
        info.send(DONE)
    except Exception as error:
        info.send(f"{type(error).__name__}: {error}"[:500])
        raise


def run(file: Path, seconds: float, chosen: list[Part]) -> Row:
    """Carry out all parts within so many seconds, and write what they told."""
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
