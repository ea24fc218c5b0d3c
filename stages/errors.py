"""What is told to a user in a line."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: its text is one line that names the thing and the way out."""


class UsageError(UserError):
    """The command line or the configuration file is wrong, whatever the state of the world."""


class StorageError(UserError):
    """The place that is written to or read from refused, e.g. a full disk: no further attempt would do better."""


class ChangedError(UserError):
    """A dataset is no longer the one that a run began with: to go on would mix two."""


class DamageError(UserError):
    """A part of a dataset is missing, or not as it was written."""
