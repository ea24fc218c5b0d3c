"""Whether a folder holds a VAE, by its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers

from stages.base.loading import first_line, resolve
from stages.errors import UserError
from stages.storage.hub import REPOSITORY

CONFIG = "config.json"


def check_vae(name_or_path: str) -> None:
    """Check a pipeline's or a VAE's folder; a name on a hub is left alone.

    Raises:
        UserError: there is no such folder, or no VAE in it.
    """
    path = Path(resolve(name_or_path))
    if not path.is_dir() and REPOSITORY.fullmatch(name_or_path):
        return
    if (missing := why_no_vae(path)) is not None:
        raise UserError(f"vae_name_or_path={name_or_path}: no VAE could be loaded from it: {missing}")


def why_no_vae(path: Path) -> str | None:
    if not path.is_dir():
        return "no such folder"
    file = next((file for file in (path / "vae" / CONFIG, path / CONFIG) if file.is_file()), None)
    if file is None:
        return f"no {CONFIG} in it, nor in a folder vae in it"
    try:
        name = json.loads(file.read_bytes()).get("_class_name")
    except (OSError, ValueError) as error:
        return f"{file}: {first_line(error)}"
    return None if hasattr(getattr(diffusers, str(name), None), "decode") else f"{name or 'its model'} is no VAE"
