"""Join a Ray cluster, or start Ray on this machine.

This module imports Ray, an optional dependency that takes seconds to import; commands import it only when they need it.
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

CONNECT_TIMEOUT = 10.0  # seconds
MAX_SOCKET_PATH = 107  # bytes
BELOW_RAY = len("/ray/session_2025-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
OBJECT_STORE = 100 << 20  # bytes; messages between processes are small, and containers have little shared memory
SHARED_MEMORY = Path("/dev/shm")


def join(address: str | None, key: str = "RAY_ADDRESS", **local: Any) -> None:
    """Join the cluster at an address, or start Ray on this machine.

    Args:
        key: the option that names the address, for error messages.
        local: arguments of `ray.init` for starting on this machine.

    Raises:
        UserError: the cluster cannot be joined, or Ray cannot be started.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_answers(address)
            ray.init(address=address, **quiet)
        else:
            arguments = _local_arguments()
            ray.init(address="local", include_dashboard=False, **quiet, **arguments, **local)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        if address:
            raise UserError(
                f"{key}={address}: no Ray cluster could be joined there: {message}: name another, or none to "
                "use this machine"
            ) from error
        raise UserError(f"Ray could not be started on this machine: {message}") from error
    end_on_sigterm()


@contextmanager
def joined() -> Iterator[None]:
    """Within the context, Ray runs: on the cluster of RAY_ADDRESS, else on this machine. Disconnects at the end.

    Raises:
        UserError: as in `join`.
    """
    connects = not ray.is_initialized()
    if connects:
        join(os.environ.get("RAY_ADDRESS"))
    try:
        yield
    finally:
        if connects:
            ray.shutdown()


def _local_arguments() -> dict[str, Any]:
    """The arguments of `ray.init` for its temporary folder and its object store.

    Raises:
        UserError: no folder has a path short enough for Ray's sockets.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    arguments: dict[str, Any] = {"object_store_memory": OBJECT_STORE}
    if not _takes_sockets(folder):
        short = Path("/tmp") / f"ray-{os.getuid()}"
        if not _takes_sockets(short) or not os.access(short.parent, os.W_OK):
            raise UserError(
                f"TMPDIR={folder}: not writable, or too long for Ray, whose sockets have at most {MAX_SOCKET_PATH} "
                f"characters: name a folder of at most {MAX_SOCKET_PATH - BELOW_RAY} by TMPDIR or RAY_TMPDIR"
            )
        arguments["_temp_dir"] = str(short)
    if not SHARED_MEMORY.is_dir():
        arguments["_plasma_directory"] = tempfile.gettempdir()
    return arguments


def _takes_sockets(folder: Path) -> bool:
    """Whether Ray can put its sockets below a folder, which it creates if it is missing."""
    is_short = len(os.fsencode(folder)) + BELOW_RAY <= MAX_SOCKET_PATH
    return is_short and (os.access(folder, os.W_OK) or not folder.exists())


def _check_answers(address: str) -> None:
    """Check that something listens at the address, because Ray itself retries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
