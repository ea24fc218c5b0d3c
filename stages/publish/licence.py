"""The licence of a teacher's weights, as its model card states it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard

from stages.adapters.folder import CARD_FILE
from stages.base.loading import resolve
from stages.errors import StorageError
from stages.storage.hub import SECONDS, hub_errors


def licence_of(name_or_path: str, revision: str | None) -> str | None:
    """Return the licence in the header of the card, in the model's folder or on the hub; None where there is none."""
    folder = Path(resolve(name_or_path))
    try:
        with hub_errors(name_or_path, "read"):
            data = _header_of(folder) if folder.is_dir() else _header_on_hub(name_or_path, revision)
    except (StorageError, FileNotFoundError, yaml.YAMLError):
        return None
    name, own = getattr(data, "license", None), getattr(data, "license_name", None)
    return str(own if name == "other" and own else name) if name else None


def _header_of(folder: Path) -> Any:
    return ModelCard.load(folder / CARD_FILE).data


def _header_on_hub(repo_id: str, revision: str | None) -> Any:
    return HfApi().model_info(repo_id, revision=revision, expand=["cardData"], timeout=SECONDS).card_data
