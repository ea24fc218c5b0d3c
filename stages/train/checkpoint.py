"""Checkpoints: one file each, whole or not there, without anything that could run code when it is loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stages.base import first_line
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.storage import whole_file
from stages.train.config import TrainConfig

CHECKPOINTS, UNFINISHED = "step-*.pt", ".step-*.pt.*.tmp"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], total_limit: int) -> Path:
    """Write the state after `step` steps, then remove all but the newest `total_limit` checkpoints, and what a killed run left.

    Raises:
        StorageError: the disk refused; the older checkpoints are as they were.
    """
    path = folder / f"step-{step:08d}.pt"
    with whole_file(path) as file:
        _save(state, file)
    for old in [*sorted(folder.glob(CHECKPOINTS))[:-total_limit], *folder.glob(UNFINISHED)]:
        old.unlink()
    return path


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides the disk's refusal behind an error of its own
            raise error.__context__ from None
        raise


def find_checkpoint(folder: Path, which: str | None) -> Path | None:
    """The file that a run goes on from: the newest in its folder for `latest`, or the one that is named; None to begin anew."""
    if which != "latest":
        return None if which is None else Path(which)
    return max(folder.glob(CHECKPOINTS), default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        UserError: it is not readable, or no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling stumbles over in a file that is none of ours
        raise UserError(f"resume_from_checkpoint: {path}: not readable: {first_line(error)}") from error
    if not isinstance(state, dict) or "dataset_fingerprint" not in state:
        raise UserError(f"resume_from_checkpoint: {path}: not a checkpoint of this project")
    return state


def check_resumable(state: dict[str, Any], dataset: Dataset, config: TrainConfig) -> None:
    """Refuse to go on with other records or another adapter than the checkpoint's.

    Raises:
        UserError: names what differs, with both values.
    """
    if state["dataset_fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"{dataset.root}: not the dataset of the checkpoint: fingerprint {dataset.fingerprint[:12]}, "
            f"the checkpoint has {state['dataset_fingerprint'][:12]}"
        )
    now = asdict(config)
    for key, before in state["config"].items():
        if now[key] != before:
            raise UserError(
                f"{key}={now[key]}: the checkpoint's run had {before}: resume with that, or begin a new run"
            )
    if state["step"] > config.max_train_steps:
        raise UserError(f"max_train_steps={config.max_train_steps}: the checkpoint is already at step {state['step']}")
