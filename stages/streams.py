"""Standard output and standard error that never raise: a closed pipe or a full disk does not end a command."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

NULL_DEVICE = Path(os.devnull)


class SteadyStream:
    """A text stream whose writes never raise; what cannot be written is lost.

    A character that cannot be encoded is written as its escape code. After the first failure (the reader is gone, the
    disk is full, the stream is closed) the descriptor leads to the null device, so that flushing at exit does not fail.

    Attributes:
        refusal: the first failure, or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or NULL_DEVICE.open("w", encoding="utf-8")
        self.refusal: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        try:
            return self.stream.isatty()
        except ValueError:  # the stream is closed
            return False

    def _give_up(self, error: OSError | ValueError) -> None:
        if isinstance(error, BlockingIOError):  # temporary: the stream is busy
            return
        self.refusal = self.refusal or error
        with suppress(OSError, ValueError, AttributeError), NULL_DEVICE.open("wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def standard_error() -> Any:
    """Standard error, or a substitute if there is none; the same object until `sys.stderr` changes."""
    global _standard_error
    if isinstance(sys.stderr, SteadyStream):
        return sys.stderr
    if _standard_error is None or _standard_error[0] is not sys.stderr:
        _standard_error = sys.stderr, SteadyStream(sys.stderr)
    return _standard_error[1]


_standard_error: tuple[TextIO | None, SteadyStream] | None = None


@contextmanager
def steady() -> Iterator[None]:
    """Within the context, `sys.stdout` and `sys.stderr` never raise, and no opened file gets their descriptors."""
    _hold_descriptors()
    before: Any = sys.stdout, sys.stderr
    output, errors = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        output.flush()
        # A closed pipe is not worth a warning.
        if isinstance(output.refusal, OSError) and output.refusal.errno != errno.EPIPE:
            errors.write(f"warning: standard output: {output.refusal.strerror}: some output is lost\n")
        errors.flush()
        sys.stdout, sys.stderr = before


def _hold_descriptors() -> None:
    """Open closed standard descriptors, or a file opened later would get one and receive libraries' output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(NULL_DEVICE, os.O_RDWR)
            os.dup2(opened, descriptor)  # dup2 makes it inheritable
            if opened != descriptor:
                os.close(opened)


def print_warnings_in_one_line() -> None:
    """Print warnings in one line each, and let libraries log only errors."""
    # Meant for developers; a user can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for library in ("diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
