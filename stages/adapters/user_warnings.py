"""Warnings that name the line of the user's own code that they are about."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import diffusers
import torch

from stages.base import patching

# Where an adapter's code and what it works in lie.
SKIPPED_FOLDERS = tuple(
    str(Path(file).parent) for file in (__file__, patching.__file__, torch.__file__, diffusers.__file__)
)


def warn(message: str) -> None:
    """Warn at the innermost frame that is neither of this package nor of what it works in."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_skipped(frame.f_code.co_filename):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth + 1)


def _is_skipped(filename: str) -> bool:
    return filename.startswith(SKIPPED_FOLDERS) or filename == contextlib.__file__
