"""A run's validations: the loss and samples of held-out trajectories, and the adapter of the lowest loss."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from stages.adapters.metadata import AdapterMetadata
from stages.records.dataset import Dataset
from stages.storage.files import whole_file
from stages.train.best import BEST, Best
from stages.train.bins import Bins
from stages.train.decoding import Decoder
from stages.train.defaults import RunConfig
from stages.train.processes import from_main
from stages.train.sampling import HeldOutSampling, NotSampledError, Samples
from stages.train.selection import SelectedSample, describe_selection
from stages.train.student import Student
from stages.train.telemetry import Trackers
from stages.train.validation_loss import ValidationLoss, guidance_gain


class Validation:
    """Measures the adapter on held-out trajectories, shows samples, and keeps the weights of the lowest loss.

    Attributes:
        unguided_loss: the base's without its adapter; nan until `begin`.
        remarks: what the dataset does not support.

    Raises:
        UserError: the VAE cannot be loaded, or does not decode the latents.
        DamageError: a sample is damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        training: list[SelectedSample],
        held_out: list[SelectedSample],
        config: RunConfig,
        student: Student,
        bins: Bins,
        device: str,
    ) -> None:
        self.dataset, self.student, self.adapter = dataset, student, student.adapter
        self.selected = describe_selection(dataset, training, held_out)
        self.root, self.is_main = Path(config.output_dir), PartialState().is_main_process
        skipping = config.on_damage == "skip"
        self.losses = ValidationLoss(dataset, held_out, config.train_batch_size, bins, device, skipping)
        self.remarks: list[str] = []
        self.sampling: HeldOutSampling | None = None
        self.decoder: Decoder | None = None
        self._prepare_samples(held_out, config, device)
        self.best: Best | None = None
        self.samples: Samples | None = None
        self.loss = self.unguided_loss = math.nan
        self.loss_by_bin: dict[str, float] = {}

    def _prepare_samples(self, held_out: list[SelectedSample], config: RunConfig, device: str) -> None:
        low, high = self.adapter.metadata.scale_range
        vae, skipping = config.vae_name_or_path, config.on_damage == "skip"
        try:
            self.sampling = HeldOutSampling(
                self.dataset, held_out, (low, high), device, skipping, config.train_batch_size
            )
        except NotSampledError as error:
            pictures = "" if vae is None else " and no pictures"
            self.remarks.append(f"validation: no gap closed{pictures}: {error}")
            return
        if vae is None:
            self.remarks.append("validation: without pictures; vae_name_or_path=FOLDER decodes some")
        else:
            from_main(partial(self._prepare_decoder, vae, self.sampling, device))

    def _prepare_decoder(self, name: str, sampling: HeldOutSampling, device: str) -> None:
        """Load the VAE in the main process, and try it on a trajectory of each size."""
        self.decoder = Decoder(name, self.dataset, device)
        for size, latents in dict(zip(sampling.sizes, sampling.two_passes, strict=True)).items():
            self.decoder.try_out(size, latents)

    def begin(self) -> None:
        """Measure the base without its adapter.

        Raises:
            UserError: there is no intact record.
        """
        self.unguided_loss, _ = self.losses.measure(self.student, guided=False)

    def measure(self, step: int, trackers: Trackers) -> None:
        """Validate the adapter as it is after `step` steps.

        Raises:
            UserError: there is no intact record.
        """
        self.loss, self.loss_by_bin = self.losses.measure(self.student)
        scalars = {"validation_loss": self.loss}
        scalars |= {f"validation_loss_by/{name}": loss for name, loss in self.loss_by_bin.items()}
        if self.sampling is not None:
            self.samples = self.sampling.measure(self.student, self._gain(self.loss))
            scalars |= {f"gap_closed/{name}": share for name, share in self.samples.gap_closed.items()}
            if self.decoder is not None:
                self._show(trackers, self.decoder.draw(self.samples), step)
        trackers.log(scalars, step)
        if self.loss < (math.inf if self.best is None else self.best.validation_loss):
            self.best = Best.of(self.adapter, step, self.loss)
            self.save_best()

    def _show(self, trackers: Trackers, picture: Image.Image, step: int) -> None:
        trackers.show("held_out", picture, step)
        with whole_file(self.root / "held_out" / f"step-{step:08d}.png") as file:
            picture.save(file, format="png")

    def _gain(self, loss: float) -> float:
        low, high = self.adapter.metadata.scale_range
        # A single trained scale leaves no room for a gain.
        return guidance_gain(loss, self.unguided_loss) if low < high else 1.0

    def metadata(self, step: int, loss: float) -> AdapterMetadata:
        """The adapter's metadata after a validation."""
        measured = {
            "kind": self.dataset.plan.config["trajectory"],
            "steps": step,
            "validation_loss": loss,
            "validation_loss_unguided": self.unguided_loss,
        }
        training = asdict(self.dataset.plan.counts) | self.selected | measured
        return replace(self.adapter.metadata, guidance_gain=self._gain(loss), training=training)

    def save_best(self) -> None:
        """Write the folder of the best adapter so far, if there is one."""
        if self.best is not None and self.is_main:
            metadata = self.metadata(self.best.step, self.best.validation_loss)
            self.best.save(self.adapter, metadata, self.root / BEST)

    def figures(self) -> dict[str, Any]:
        """What `training.json` holds of the last validation, and of the best."""
        return {
            "validation_loss": self.loss,
            "validation_loss_unguided": self.unguided_loss,
            "validation_loss_by": self.loss_by_bin,
            "gap_closed": {} if self.samples is None else self.samples.gap_closed,
            "best": None if self.best is None else {"folder": BEST, **self.best.figures},
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"unguided_loss": self.unguided_loss, "best": None if self.best is None else self.best._asdict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.unguided_loss = state["unguided_loss"]
        self.best = None if state["best"] is None else Best(**state["best"])
