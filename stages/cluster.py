"""Joining a Ray cluster, or starting one on this machine; `ray` itself is imported by who asks, because few commands have it."""

from __future__ import annotations

import logging
import socket
from typing import Any

from stages.errors import UserError
from stages.signals import end_on_sigterm

SECONDS_TO_ANSWER = 10.0


def join(ray: Any, address: str | None, **local: Any) -> None:
    """Join the cluster at an address, else start Ray on this machine with what `ray.init` is to be given for that.

    Raises:
        UserError: there is no cluster that can be joined.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_answers(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet, **local)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise UserError(f"ray_address={address}: no Ray cluster could be joined there: {error}") from error
    end_on_sigterm()


def _check_answers(address: str) -> None:
    """Ray itself asks a place where nobody is for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER).close()
