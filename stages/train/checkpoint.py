"""Checkpoints: one file each, written atomically and loaded without executing code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stages.base.loading import first_line
from stages.configuration.options import dotted
from stages.errors import StorageError, UserError
from stages.records.dataset import Dataset
from stages.storage.files import make_folder, whole_file
from stages.train.config import KEPT_WHEN_RESUMED, effective
from stages.train.defaults import RunConfig

CHECKPOINTS, UNFINISHED = "step-[0-9]*.pt", ".step-*.pt.*.tmp"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], total_limit: int) -> Path:
    """Write the state after `step` steps, then keep only the newest `total_limit` checkpoints up to this step.

    Checkpoints of later steps belong to an abandoned run; they and the temporary files of killed runs are removed.

    Raises:
        StorageError: the checkpoint could not be written; the older ones are unchanged.
    """
    path = folder / f"step-{step:08d}.pt"
    with whole_file(path) as file:
        _save(state, file)
    every = sorted(folder.glob(CHECKPOINTS))
    until = every.index(path) + 1
    for old in [*every[until:], *every[:until][:-total_limit], *folder.glob(UNFINISHED)]:
        old.unlink(missing_ok=True)
    return path


def check_room(folder: Path, size: int, count: int) -> None:
    """Refuse a run whose checkpoints would fill the disk.

    Args:
        size: bytes of one checkpoint.
        count: checkpoints that the run adds to those on the disk.

    Raises:
        StorageError: the free space is too small.
    """
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if size * count > free:
        raise StorageError(
            f"{folder}: {count} checkpoints of {size / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} MB are free: "
            "make room, name another output_dir, or lower checkpoints_total_limit"
        )


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch wraps the error of the disk
            raise error.__context__ from None
        raise


def find_checkpoint(folder: Path, which: str | None) -> Path | None:
    """The checkpoint to resume from: for `latest` the newest in the folder, else the named file; None for a new run."""
    if which != "latest":
        return None if which is None else Path(which)
    return max(folder.glob(CHECKPOINTS), default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load the state from a checkpoint.

    Raises:
        UserError: the file cannot be read, or is not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"resume_from_checkpoint={path}: no such file: name one of output_dir's checkpoints/, or `latest`"
        ) from error
    except Exception as error:  # unpickling a foreign file raises errors of any type
        message = first_line(error) if isinstance(error, OSError) else "damaged, or not a checkpoint"
        raise UserError(
            f"resume_from_checkpoint: {path}: not readable ({message}): move it away to resume from the one before"
        ) from error
    if not isinstance(state, dict) or "dataset_fingerprint" not in state:
        raise UserError(f"resume_from_checkpoint: {path}: not a checkpoint of this project")
    return state


def check_resumable(state: dict[str, Any], dataset: Dataset, config: RunConfig) -> None:
    """Refuse to resume with another dataset, or with options that must stay.

    Raises:
        UserError: names the difference, with both values.
    """
    if state["dataset_fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"{dataset.root}: not the dataset of the checkpoint: fingerprint {dataset.fingerprint[:12]}, "
            f"the checkpoint has {state['dataset_fingerprint'][:12]}: set data_dir to "
            f"{state.get('data_dir', 'that one')}, or take another output_dir"
        )
    now, before = dotted(effective(config)), dotted(state["config"])
    changed = [key for key in sorted(now.keys() | before) if now.get(key) != before.get(key)]
    for key in changed:
        message = f"{key}={now.get(key)}: the checkpoint's run had {before.get(key)}"
        if key.partition(".")[0] in KEPT_WHEN_RESUMED:
            raise UserError(f"{message}: resume with that value, or start a new run in another output_dir")
        if state["step"] == config.max_train_steps:
            raise UserError(f"{message}, and has finished: raise max_train_steps, or take another output_dir")
    if state["step"] > config.max_train_steps:
        raise UserError(
            f"max_train_steps={config.max_train_steps}: the checkpoint is already at step {state['step']}: raise "
            "it, or take another output_dir"
        )
