"""Standard output and standard error, whatever has become of them: what is told there never ends who tells it."""

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

NOWHERE = Path(os.devnull)


class SteadyStream:
    """A text stream that can always be written to: what it does not take is lost, and the rest goes on.

    A character that it cannot encode is told by its code. Once it refuses (its reader has gone, its disk is full, it is
    closed), its descriptor leads nowhere, so that nothing fails at what it still holds when the process ends.

    Attributes:
        refusal: why it refused, if it did.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or NOWHERE.open("w", encoding="utf-8")
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
        except ValueError:  # it is closed
            return False

    def _give_up(self, error: OSError | ValueError) -> None:
        if isinstance(error, BlockingIOError):  # it takes more in a moment
            return
        self.refusal = self.refusal or error
        with suppress(OSError, ValueError, AttributeError), NOWHERE.open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def standard_error() -> Any:
    """Where to tell how a run goes, even if there is no standard error; the same object until `sys.stderr` is another."""
    global _standard_error
    if isinstance(sys.stderr, SteadyStream):
        return sys.stderr
    if _standard_error is None or _standard_error[0] is not sys.stderr:
        _standard_error = sys.stderr, SteadyStream(sys.stderr)
    return _standard_error[1]


_standard_error: tuple[TextIO | None, SteadyStream] | None = None


@contextmanager
def steady() -> Iterator[None]:
    """Within it, `sys.stdout` and `sys.stderr` are steady, and no file that is opened gets the number of one that is closed."""
    _hold_descriptors()
    before: Any = sys.stdout, sys.stderr
    output, errors = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        output.flush()
        if isinstance(output.refusal, OSError) and output.refusal.errno != errno.EPIPE:  # whose reader had enough
            errors.write(f"warning: standard output: {output.refusal.strerror}: what was told there is lost\n")
        errors.flush()
        sys.stdout, sys.stderr = before


def _hold_descriptors() -> None:
    """Open what is closed of standard input, output and error: else libraries would write there into a file of ours."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(NOWHERE, os.O_RDWR)
            os.dup2(opened, descriptor)  # which a child inherits
            if opened != descriptor:
                os.close(opened)


def print_warnings_in_one_line() -> None:
    """Have warnings told in a line, and libraries say no more than their errors."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to us; a user can do nothing about them
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for library in ("diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
