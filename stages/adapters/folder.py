"""An adapter's folder: JSON and safetensors, here or on a model hub; nothing in it can run code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from stages.base import first_line
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.adapters.adapter import GuidanceAdapter

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT_VERSION = 2


def save(adapter: GuidanceAdapter, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}
    save_file(weights, path / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"format_version": FORMAT_VERSION, "adapter": asdict(adapter.config), "sites": adapter.shapes}
    (path / CONFIG_FILE).write_text(json.dumps(config | adapter.about, indent=2) + "\n")


@contextmanager
def named(name_or_path: str | Path) -> Iterator[None]:
    """Whatever a file that is none of ours makes our code stumble over is told as what it is."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{name_or_path}: not an adapter: {first_line(error)}") from error


def load(
    name_or_path: str | Path, **source: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Configuration, sites, what else is told, and weights.

    Raises:
        UserError: there is no adapter of this version.
    """
    with named(name_or_path):
        path = Path(name_or_path)
        if not path.is_dir():
            path = Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **source))
        about = json.loads((path / CONFIG_FILE).read_bytes())
        version = about.pop("format_version")
        if version != FORMAT_VERSION:
            way_out = "upgrade this project" if version > FORMAT_VERSION else "train it again"
            raise UserError(
                f"{name_or_path}: written in version {version} of the format, not {FORMAT_VERSION}: {way_out}"
            )
        return about.pop("adapter"), about.pop("sites"), about, load_file(path / WEIGHTS_FILE)


def push(
    adapter: GuidanceAdapter,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload guidance adapter",
) -> str:
    raise NotImplementedError
