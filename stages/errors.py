"""What is told to a user in a line."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: its text is one line that names the thing and the way out."""


class StorageError(UserError):
    """The place that is written to refused, e.g. a full disk: no other worker and no further attempt would do better."""


def require_positive(config: object, *keys: str) -> None:
    """Refuse a configuration in which one of these counts is below 1."""
    for key in keys:
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: at least 1")
