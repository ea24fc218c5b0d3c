"""Decode sampled latents into pictures, to show a run's progress; needs a VAE that the user names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoModel
from PIL import Image
from torch import Tensor

from stages.base.decoder_input import to_decoder_input
from stages.base.loading import first_line, resolve
from stages.base.pictures import grid, to_picture
from stages.base.size import VIDEO_DIMS
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.sampling import Samples


class Decoder:
    """Decodes the latents of images, and of the first frames of videos, of a dataset that `check_vae` accepted.

    Raises:
        UserError: there is no VAE at that path.
    """

    def __init__(self, name_or_path: str, dataset: Dataset, device: str) -> None:
        self.shapes = {name: facts.decoder_input or [] for name, facts in dataset.info.sizes.items()}
        self.name_or_path = name_or_path
        self.vae = load_vae(name_or_path).to(device)

    def try_out(self, size: str, latents: Tensor) -> None:
        """Decode latents `[...]` of two passes, before the first step.

        Raises:
            UserError: they do not decode; the first validation would fail.
        """
        try:
            self.picture(size, latents)
        except Exception as error:  # a foreign VAE may raise anything on latents it was not made for
            message = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"vae_name_or_path={self.name_or_path}: cannot decode the recorded latents: {message}: leave it out"
            ) from error

    def draw(self, samples: Samples) -> Image.Image:
        """A column per trajectory; rows: no guidance, two passes as recorded, one pass."""
        rows = (samples.unguided, samples.two_passes, samples.one_pass)
        return grid([list(map(self.picture, samples.sizes, row)) for row in rows])

    @torch.no_grad()
    def picture(self, size: str, latents: Tensor) -> Image.Image:
        """Decode the final latents `[...]` of a trajectory of that size."""
        received = to_decoder_input(self.vae.config, latents[None], self.shapes[size])
        decoded = self.vae.decode(received.to(next(self.vae.parameters()))).sample
        image = decoded[0, :, 0] if decoded.ndim == VIDEO_DIMS else decoded[0]
        return to_picture(image[: 3 if len(image) > 3 else None])  # further channels are no colours


def load_vae(name_or_path: str) -> Any:
    """Load a VAE, from a pipeline or by itself, in a folder or on a hub.

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
        if callable(getattr(vae, "decode", None)):
            if hasattr(vae, "enable_tiling"):
                vae.enable_tiling()  # a large image would take more memory than the step
            return vae.eval().requires_grad_(False)
        message = f"{type(vae).__name__} is no VAE"
        break
    raise UserError(f"vae_name_or_path={name_or_path}: no VAE could be loaded from it: {message}")
