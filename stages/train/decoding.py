"""Decode sampled latents into pictures, to show a run's progress; needs a VAE that the user names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoModel
from PIL import Image
from torch import Tensor

from stages.base.loading import first_line, resolve
from stages.base.pictures import grid, to_picture
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.sampling import Samples


class Decoder:
    """Decodes the latents of images.

    Raises:
        UserError: there is no VAE at that path, or the latents are not those of images.
    """

    def __init__(self, name_or_path: str, dataset: Dataset, device: str) -> None:
        shape = dataset.info.tensors["latent"].shape
        if len(shape) != 3:
            raise UserError(f"vae_name_or_path={name_or_path}: latents {shape} are not those of images: leave it out")
        self.name_or_path = name_or_path
        self.vae = load_vae(name_or_path, shape[0]).to(device)

    def try_out(self, latents: Tensor) -> None:
        """Decode latents `[c, h, w]` of two passes, before the first step.

        Raises:
            UserError: they do not decode; the first validation would fail.
        """
        try:
            self.picture(latents)
        except Exception as error:  # a foreign VAE may raise anything on latents it was not made for
            message = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"vae_name_or_path={self.name_or_path}: cannot decode the recorded latents: {message}: leave it out"
            ) from error

    def draw(self, samples: Samples) -> Image.Image:
        """A column per trajectory; rows: no guidance, two passes as recorded, one pass."""
        rows = (samples.unguided, samples.two_passes, samples.one_pass)
        return grid([[self.picture(latents) for latents in row] for row in rows])

    @torch.no_grad()
    def picture(self, latents: Tensor) -> Image.Image:
        """Decode latents `[c, h, w]`."""
        config: Any = self.vae.config
        like = next(self.vae.parameters())
        scaled = latents[None] / config.scaling_factor + (config.get("shift_factor") or 0)
        return to_picture(self.vae.decode(scaled.to(like)).sample[0])


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
