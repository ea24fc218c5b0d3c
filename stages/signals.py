"""Termination of a command by a signal."""

from __future__ import annotations

import signal
import threading


def end_on_sigterm() -> None:
    """Handle SIGTERM, which schedulers send, like Ctrl-C: child processes end, too, and the command prints one line.

    Call it again after `ray.init`, which installs a handler that dumps a trace. Only the main thread can set handlers;
    in other threads the call does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
