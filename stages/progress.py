"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any, TextIO

from tqdm import tqdm

from stages.streams import standard_error

SECONDS_BETWEEN_LINES = 10.0


class _Lines:
    """Writes each state of tqdm's bar as a line of a log, instead of redrawing it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(total: int, description: str, unit: str, initial: int = 0, shown: bool = True) -> tqdm[Any]:
    """A progress bar over `total` units, of which `initial` are done already; close it, or use it as a context."""
    stream = standard_error()
    terminal = stream.isatty()
    return tqdm(
        total=total,
        initial=initial,
        disable=not shown,
        desc=description,
        unit=unit,
        smoothing=0.05,
        dynamic_ncols=terminal,
        file=stream if terminal else _Lines(stream),
        mininterval=0.1 if terminal else SECONDS_BETWEEN_LINES,
        bar_format=None if terminal else "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}",
    )
