"""How a command ends when it is told to."""

from __future__ import annotations

import signal
import threading


def end_on_sigterm() -> None:
    """Let SIGTERM, which schedulers send, end this process as Ctrl-C does: what runs beside it ends too, and it is told in a line.

    Only the main thread can; `ray.init` puts a handler of its own in the place, which ends in a dump.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
