"""Whether a VAE decodes a dataset's latents, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers

from stages.base.loading import first_line, resolve
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.storage.hub import REPOSITORY

CONFIG = "config.json"
CHANNELS = ("latent_channels", "z_dim")  # in the configurations of VAEs


def check_vae(name_or_path: str, dataset: Dataset) -> None:
    """Check a dataset, and the configuration in a pipeline's or a VAE's folder; a name on a hub is left alone.

    Raises:
        UserError: the dataset does not tell how to decode its latents, there is no such folder, or no VAE in it for
            latents of so many channels.
    """
    shapes = [size.decoder_input for size in dataset.info.sizes.values()]
    if None in shapes:
        raise UserError(
            f"vae_name_or_path={name_or_path}: {dataset.root} does not tell how to decode its latents (decoder_input), "
            "because the teacher's pipeline has its own way, or because an older version generated it: leave it out"
        )
    path = Path(resolve(name_or_path))
    if not path.is_dir() and REPOSITORY.fullmatch(name_or_path):
        return
    if (reason := why_no_vae(path, {shape[0] for shape in shapes if shape is not None})) is not None:
        raise UserError(f"vae_name_or_path={name_or_path}: no VAE could be loaded from it: {reason}")


def why_no_vae(path: Path, channels: set[int]) -> str | None:
    """The reason why a folder holds no VAE for latents of so many channels; None if it may hold one."""
    if not path.is_dir():
        return "no such folder"
    file = next((file for file in (path / "vae" / CONFIG, path / CONFIG) if file.is_file()), None)
    if file is None:
        return f"no {CONFIG} in it, nor in a folder vae in it"
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
        name = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        return f"{file}: {first_line(error)}"
    if not hasattr(getattr(diffusers, str(name), None), "decode"):
        return f"{name or 'its model'} is no VAE"
    own = next((config[key] for key in CHANNELS if key in config), None)
    if own is not None and {own} != channels:
        return f"its latents have {own} channels, and those of the dataset {', '.join(map(str, sorted(channels)))}"
    return None
