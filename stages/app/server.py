"""The app's server: on this machine alone unless asked otherwise, and without requests to others."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn

from stages.errors import UserError

SECONDS_TO_CLOSE = 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is not this machine's, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"host={host} port={port}: {reason}: name another port, or 0 for a free one") from error


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(application: Any, listener: socket.socket) -> None:
    """Serve an ASGI application until Ctrl-C."""
    config = uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=SECONDS_TO_CLOSE)
    uvicorn.Server(config).run(sockets=[listener])
