"""Decode some held-out predictions into images, to show a run's progress; needs a VAE that the user names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoModel, DDIMScheduler
from PIL import Image
from torch import Tensor

from stages.base.loading import first_line, resolve
from stages.base.pictures import grid, to_picture
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.batch import Batch
from stages.train.objective import noise_levels
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.window import load

COLUMNS = 8


class Decoder:
    """Decodes the clean latents that predictions at recorded steps imply.

    Raises:
        UserError: there is no VAE at that path, or the latents are not those of images.
    """

    def __init__(
        self,
        name_or_path: str,
        dataset: Dataset,
        samples: list[SelectedSample],
        device: str,
        skip_damaged: bool = False,
    ) -> None:
        shape = dataset.info.tensors["latent"].shape
        if len(shape) != 3:
            raise UserError(f"vae_name_or_path={name_or_path}: latents {shape} are not those of images: leave it out")
        self.teacher = dataset.info.teacher
        self.noise = noise_levels(self.teacher)
        self.device = device
        self.vae = load_vae(name_or_path, shape[0]).to(device)
        self.batch = example_records(dataset, samples[:COLUMNS], skip_damaged)
        self._try_out(name_or_path)

    @torch.no_grad()
    def _try_out(self, name_or_path: str) -> None:
        """
        Raises:
            UserError: the recorded targets do not decode; the first validation would fail.
        """
        try:
            for image in self.decode(self.batch.target.float().cpu()):
                to_picture(image)
        except Exception as error:  # a foreign VAE may raise anything on latents it was not made for
            message = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"vae_name_or_path={name_or_path}: cannot decode the recorded latents: {message}: leave it out"
            ) from error

    @torch.no_grad()
    def draw(self, student: Student) -> Image.Image:
        """A column per held-out record, less noisy to the right; rows: no guidance, the recorded target, one pass."""
        batch = self.batch.to(self.device, student.dtype)
        rows = (student.predict(batch, guided=False), batch.target, student.predict(batch))
        return grid([[to_picture(image) for image in self.decode(row.float().cpu())] for row in rows])

    def decode(self, predictions: Tensor) -> Tensor:
        """Decode predictions for the records into images `[n, channels, height, width]` in [-1, 1]."""
        config: Any = self.vae.config
        like = next(self.vae.parameters())
        latents = self.denoised(predictions) / config.scaling_factor + (config.get("shift_factor") or 0)
        return self.vae.decode(latents.to(like)).sample.clamp(-1, 1)

    def denoised(self, predictions: Tensor) -> Tensor:
        """The clean latents `[n, c, h, w]` that predictions at the records' timesteps imply."""
        latents = self.batch.latent.float()
        steps = (self.batch.timestep.float() / self.teacher.layout.timestep_scale).round().long()
        steps = steps.clamp(0, len(self.noise) - 1)
        if self.teacher.prediction_type is None:  # flow matching: the prediction is noise minus image
            return latents - self.noise[steps].view(-1, 1, 1, 1) * predictions
        known = {"clip_sample": False, "thresholding": False, "prediction_type": self.teacher.prediction_type}
        scheduler: Any = DDIMScheduler.from_config(self.teacher.scheduler_config, **known)
        scheduler.set_timesteps(len(self.noise))
        clean = [
            scheduler.step(prediction, int(step), latent).pred_original_sample
            for prediction, step, latent in zip(predictions, steps, latents, strict=True)
        ]
        return torch.stack(clean)


def load_vae(name_or_path: str, channels: int) -> Any:
    """Load a VAE for latents of that many channels, from a pipeline or by itself, in a folder or on a hub.

    Raises:
        UserError: there is none.
    """
    path, message = resolve(name_or_path), ""
    for location in ({"subfolder": "vae"}, {}):
        try:
            vae = AutoModel.from_pretrained(path, **location)
        except (OSError, ValueError, KeyError) as error:
            message = message or first_line(error)
            continue
        config = getattr(vae, "config", {})
        if (
            not hasattr(vae, "decode")
            or config.get("scaling_factor") is None
            or config.get("latent_channels") != channels
        ):
            message = f"{type(vae).__name__} is not a VAE for latents of {channels} channels"
            break
        return vae.eval().requires_grad_(False)
    raise UserError(f"vae_name_or_path={name_or_path}: no VAE could be loaded from it: {message}")


def example_records(dataset: Dataset, samples: list[SelectedSample], skip_damaged: bool = False) -> Batch:
    """One intact record per sample, each later in its trajectory than that of the sample before."""
    window = load(dataset, samples, skip_damaged)
    counts = torch.tensor([sample.records for sample in samples])
    places = counts.cumsum(0) - counts + torch.arange(len(samples)) * counts // len(samples)
    return window.take(places[window.intact[places]])
