"""Telemetry of a run: a meter of losses and speed, and the trackers that log them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image
from torch import Tensor

from stages.base.loading import first_line
from stages.errors import UserError
from stages.train.batch import Batch
from stages.train.bins import BinnedMean, Bins

LOGS = "logs"


class BatchPosition(NamedTuple):
    """A batch's step, and the positions in the stream's order of its records, those of all processes `[n]`."""

    step: int
    positions: Tensor


class Meter:
    """Accumulates measurements between two log entries; only `read` and `not_finite` synchronize with the device.

    Attributes:
        seconds: total time of all steps, without validations and checkpoints.
    """

    def __init__(self, bins: Bins, device: str) -> None:
        self.losses = BinnedMean(bins, device)
        self.seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        self.batches: list[tuple[BatchPosition, Tensor]] = []
        self.norms: list[Tensor] = []
        self.before, self.waited = self.seconds, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time within the context as time of steps."""
        start = time.monotonic()
        yield
        self.seconds += time.monotonic() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within the context as time that a step waits for records."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def add(self, losses: Tensor, batch: Batch, position: BatchPosition) -> None:
        """Add a batch of n records with their losses `[n]`."""
        self.losses.add(losses, batch)
        self.batches.append((position, losses))

    def not_finite(self) -> tuple[BatchPosition, list[int]] | None:
        """The first batch with non-finite losses, and the indices of those records; None if all losses are finite."""
        for position, losses in self.batches:
            wrong = (~losses.isfinite()).nonzero().flatten().tolist()
            if wrong:
                return position, wrong
        return None

    def read(self) -> dict[str, float]:
        """Return the measurements by name, and reset."""
        with self.working():  # the device may still be computing
            loss, by_bin = self.losses.means()
        seconds, records = self.seconds - self.before, sum(len(position.positions) for position, _ in self.batches)
        scalars = {
            "loss": loss,
            "gradient_norm": float(torch.stack(self.norms).mean()),
            "records_per_second": records / seconds,
            "waiting_share": self.waited / seconds,
        }
        self._clear()
        return scalars | {f"loss_by/{name}": value for name, value in by_bin.items()}


def tracker_class(report_to: str) -> Any:
    """The accelerate tracker of that name; None for `none`.

    Raises:
        UserError: there is no such tracker, or it is not installed.
    """
    if report_to == "none":
        return None
    if report_to not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"report_to={report_to}: one of none, {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
    if report_to not in map(str, get_available_trackers()):
        raise UserError(f"report_to={report_to}: not installed: install it, or say report_to=none")
    return LOGGER_TYPE_TO_CLASS[report_to]


class Trackers:
    """The accelerate tracker that a run reports to.

    A tracker that fails during the run is dropped with a warning; the run continues.

    Raises:
        UserError: the tracker could not start.
    """

    def __init__(self, report_to: str, root: Path, step: int, settings: dict[str, Any]) -> None:
        """
        Args:
            report_to: the tracker's name, or `none`.
            step: the step from which the run resumes; TensorBoard drops the entries of later steps.
            settings: the run's configuration.
        """
        self.tracker: Any = None
        self.report_to = report_to
        kind = tracker_class(report_to)
        if kind is None or not PartialState().is_main_process:
            return
        options = {"purge_step": step + 1} if report_to == "tensorboard" else {}
        try:
            tracker = kind(LOGS, logging_dir=root, **options) if kind.requires_logging_directory else kind(root.name)
            tracker.start()
            tracker.store_init_configuration(settings)
        except Exception as error:  # third-party code may raise anything: log-in, server, disk
            caught = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"report_to={report_to}: could not start: {caught}: fix that, or say report_to=none"
            ) from error
        self.tracker = tracker

    def log(self, values: dict[str, float], step: int) -> None:
        with self._drop_on_failure():
            if self.tracker is not None:
                self.tracker.log(values, step=step)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log an image, if the tracker supports images."""
        pixels = np.asarray(picture)
        with self._drop_on_failure():
            if getattr(self.tracker, "name", None) == "tensorboard":
                self.tracker.log_images({name: pixels.transpose(2, 0, 1)[None]}, step=step)
            elif hasattr(self.tracker, "log_images"):
                self.tracker.log_images({name: [pixels]}, step=step)

    @contextmanager
    def _drop_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.tracker = None
            message = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"report_to={self.report_to}: failed and is no longer used: {message}", stacklevel=3)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._drop_on_failure():
            if self.tracker is not None:
                self.tracker.finish()
