"""Checkpoints: one file each, whole or not there, without anything that could run code when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.base import first_line
from stages.errors import UserError
from stages.records.storage import whole_file


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], total_limit: int) -> Path:
    """Write the state after `step` steps, then remove all but the newest `total_limit` checkpoints."""
    path = folder / f"step-{step:08d}.pt"
    with whole_file(path) as file:
        torch.save(state, file)
    for old in sorted(folder.glob("step-*.pt"))[:-total_limit]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, which: str) -> dict[str, Any]:
    """The state of `latest` in a folder, or of a file.

    Raises:
        UserError: there is none, or it is not readable.
    """
    path = Path(which)
    if which == "latest":
        saved = sorted(folder.glob("step-*.pt"))
        if not saved:
            raise UserError(f"resume_from_checkpoint=latest: there is no checkpoint in {folder}")
        path = saved[-1]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling stumbles over in a file that is none of ours
        raise UserError(f"resume_from_checkpoint={which}: {path}: not readable: {first_line(error)}") from error
    if not isinstance(state, dict) or "dataset_fingerprint" not in state:
        raise UserError(f"resume_from_checkpoint={which}: {path}: not a checkpoint of this project")
    return state
