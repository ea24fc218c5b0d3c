"""What a run tells while it goes on: a meter of its losses and its speed, and the trackers that these go to."""

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
from stages.train.bins import BinnedMean, Range

LOGS = "logs"


class Place(NamedTuple):
    """Of a batch: the step it belongs to, where in the stream it begins, and how many places of it all processes' batches take."""

    step: int
    begin: int
    length: int


class Meter:
    """Gathers over the steps from one point of the log to the next, without making the device wait before `read`.

    Attributes:
        seconds: that all steps took so far, without validations and checkpoints.
    """

    def __init__(self, scale_range: Range, timestep_range: Range, device: str) -> None:
        self.losses = BinnedMean(scale_range, timestep_range, device)
        self.seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        self.batches: list[tuple[Place, Tensor]] = []
        self.norms: list[Tensor] = []
        self.before, self.waited = self.seconds, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time within it is time that steps take."""
        start = time.monotonic()
        yield
        self.seconds += time.monotonic() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within it is time in which a step waits for records."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def add(self, losses: Tensor, scale: Tensor, timestep: Tensor, place: Place) -> None:
        """The losses, scales and timesteps of a batch's n records `[n]`."""
        self.losses.add(losses, scale, timestep)
        self.batches.append((place, losses))

    def not_finite(self) -> tuple[Place, list[int]] | None:
        """The first batch with losses that are no numbers, and which of its records have them."""
        for place, losses in self.batches:
            wrong = (~losses.isfinite()).nonzero().flatten().tolist()
            if wrong:
                return place, wrong
        return None

    def read(self) -> dict[str, float]:
        """What was gathered, by name; then it begins anew."""
        with self.working():  # the device still is
            loss, by_bin = self.losses.means()
        seconds, records = self.seconds - self.before, sum(place.length for place, _ in self.batches)
        scalars = {
            "loss": loss,
            "gradient_norm": float(torch.stack(self.norms).mean()),
            "records_per_second": records / seconds,
            "waiting_share": self.waited / seconds,
        }
        self._clear()
        return scalars | {f"loss_by/{name}": value for name, value in by_bin.items()}


def tracker_class(report_to: str) -> Any:
    """The tracker of accelerate that is meant; None for `none`.

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
    """The trackers of accelerate that a run reports to, by name; `none` is none.

    One that fails while the run goes on is told of and left: it is no reason to end a run.

    Raises:
        UserError: one could not begin.
    """

    def __init__(self, report_to: str, root: Path, step: int, settings: dict[str, Any]) -> None:
        """
        Args:
            step: the last one of the state that the run goes on from: TensorBoard drops what was told of later ones.
            settings: the run's configuration.
        """
        self.tracker: Any = None
        self.report_to = report_to
        kind = tracker_class(report_to)
        if kind is None or not PartialState().is_main_process:
            return
        known = {"purge_step": step + 1} if report_to == "tensorboard" else {}
        try:
            tracker = kind(LOGS, logging_dir=root, **known) if kind.requires_logging_directory else kind(root.name)
            tracker.start()
            tracker.store_init_configuration(settings)
        except Exception as error:  # whatever another's code stumbles over: a log-in, a server, a disk
            caught = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"report_to={report_to}: could not begin: {caught}: mend that, or say report_to=none"
            ) from error
        self.tracker = tracker

    def log(self, values: dict[str, float], step: int) -> None:
        with self._left_if_it_fails():
            if self.tracker is not None:
                self.tracker.log(values, step=step)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture, where a tracker shows pictures."""
        pixels = np.asarray(picture)
        with self._left_if_it_fails():
            if getattr(self.tracker, "name", None) == "tensorboard":
                self.tracker.log_images({name: pixels.transpose(2, 0, 1)[None]}, step=step)
            elif hasattr(self.tracker, "log_images"):
                self.tracker.log_images({name: [pixels]}, step=step)

    @contextmanager
    def _left_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.tracker = None
            message = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"report_to={self.report_to}: failed, and is told no more: {message}", stacklevel=3)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._left_if_it_fails():
            if self.tracker is not None:
                self.tracker.finish()
