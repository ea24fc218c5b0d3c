"""Joining a Ray cluster, or starting one on this machine.

This module imports Ray, which takes seconds and is an optional dependency: commands import it when they need it.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from stages.errors import UserError
from stages.signals import end_on_sigterm

SECONDS_TO_ANSWER = 10.0
LONGEST_SOCKET = 107  # bytes of the path of a Unix socket
BELOW_RAY = len("/ray/session_2025-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
OBJECT_STORE = 100 << 20  # what passes between our processes is small: it fits into what containers have for it
SHARED_MEMORY = Path("/dev/shm")


def join(address: str | None, key: str = "RAY_ADDRESS", **local: Any) -> None:
    """Join the cluster at an address, else start Ray on this machine with what `ray.init` is to be given for that.

    Args:
        key: what named the address, for the message.

    Raises:
        UserError: there is no cluster that can be joined, or none can be started.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_answers(address)
            ray.init(address=address, **quiet)
        else:
            places = _places()
            ray.init(address="local", include_dashboard=False, **quiet, **places, **local)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        if address:
            raise UserError(
                f"{key}={address}: no Ray cluster could be joined there: {message}: name another, or none for this machine"
            ) from error
        raise UserError(f"Ray could not be started on this machine: {message}") from error
    end_on_sigterm()


@contextmanager
def joined() -> Iterator[None]:
    """Within it, Ray is there: the cluster of RAY_ADDRESS, else this machine. What was started here is ended here.

    Raises:
        UserError: as `join`.
    """
    ours = not ray.is_initialized()
    if ours:
        join(os.environ.get("RAY_ADDRESS"))
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _places() -> dict[str, Any]:
    """Where a Ray of our own has its files, and how much memory for what passes between processes.

    Raises:
        UserError: no folder is short enough for its sockets.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    places: dict[str, Any] = {"object_store_memory": OBJECT_STORE}
    if not _takes_sockets(folder):
        short = Path("/tmp") / f"ray-{os.getuid()}"
        if not _takes_sockets(short) or not os.access(short.parent, os.W_OK):
            raise UserError(
                f"TMPDIR={folder}: cannot be written, or is too long for Ray, whose sockets have at most {LONGEST_SOCKET} "
                f"characters: name a folder of at most {LONGEST_SOCKET - BELOW_RAY} by TMPDIR or RAY_TMPDIR"
            )
        places["_temp_dir"] = str(short)
    if not SHARED_MEMORY.is_dir():
        places["_plasma_directory"] = tempfile.gettempdir()
    return places


def _takes_sockets(folder: Path) -> bool:
    """Whether Ray's sockets can be below a folder, which it makes where there is none."""
    is_short = len(os.fsencode(folder)) + BELOW_RAY <= LONGEST_SOCKET
    return is_short and (os.access(folder, os.W_OK) or not folder.exists())


def _check_answers(address: str) -> None:
    """Ray itself asks a place where nobody is for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER).close()
