"""Warnings that point to the line of the user's code that caused them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import diffusers
import torch

from stages.base import patching

# Frames of these folders are skipped: the adapter's code, and libraries that call it.
SKIPPED_FOLDERS = tuple(
    str(Path(file).parent) for file in (__file__, patching.__file__, torch.__file__, diffusers.__file__)
)


def warn(message: str) -> None:
    """Warn at the innermost frame outside the skipped folders."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_skipped(frame.f_code.co_filename):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth + 1)


def _is_skipped(filename: str) -> bool:
    return filename.startswith(SKIPPED_FOLDERS) or filename == contextlib.__file__
