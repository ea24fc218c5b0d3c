"""Errors that a command prints in one line."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix; its one-line text names the cause and the way out."""


class UsageError(UserError):
    """The command line or the configuration file is invalid."""


class StorageError(UserError):
    """Reading or writing failed, e.g. because the disk is full; a retry would fail, too."""


class ChangedError(UserError):
    """The dataset changed during a run; continuing would mix two datasets."""


class DamageError(UserError):
    """A part of a dataset is missing, or differs from what was written."""
