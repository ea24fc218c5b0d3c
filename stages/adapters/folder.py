"""An adapter's folder: JSON and safetensors, on disk, in a bucket or on a model hub; nothing in it can run code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from huggingface_hub import HfApi, snapshot_download
from obstore.exceptions import BaseError
from safetensors.torch import load_file
from torch import Tensor

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.card import model_card
from stages.adapters.config import AdapterConfig
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.sites import Shape
from stages.base.loading import check_name, first_line
from stages.base.places import map_strings, public
from stages.errors import UserError
from stages.storage.bucket import SCHEMES, read_object
from stages.storage.files import whole_file, write_json
from stages.storage.hub import REPOSITORY, reason

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT_KEY, FORMAT_VERSION = "format_version", 3
MAX_MESSAGE_LENGTH = 300


def save(adapter: AdapterBase, path: Path) -> None:
    """Write weights, model card and configuration, each whole or not at all, the configuration last."""
    weights = {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}
    with whole_file(path / WEIGHTS_FILE) as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    write_card(adapter, path)


def write_card(adapter: AdapterBase, path: Path) -> None:
    """Write model card and configuration."""
    config = {FORMAT_KEY: FORMAT_VERSION, "adapter": asdict(adapter.config), "sites": adapter.shapes}
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    card = model_card(adapter.variant, parameters, adapter.metadata)
    with whole_file(path / CARD_FILE) as file:
        file.write(card.encode())
    write_json(path / CONFIG_FILE, config | adapter.metadata.to_json())


@contextmanager
def loading_errors(name_or_path: str | Path) -> Iterator[None]:
    """Turn loading errors into a `UserError`."""
    try:
        yield
    except (
        OSError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        # In one line, because torch names what is wrong with the weights in its second line.
        message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
        if isinstance(error, FileNotFoundError) and error.filename:
            message = f"no {Path(error.filename).name} in it"
        raise UserError(f"{name_or_path}: not an adapter: {message}") from error


def load(
    name_or_path: str | Path, **source: Any
) -> tuple[AdapterConfig, dict[str, Shape], AdapterMetadata, dict[str, Tensor]]:
    """Read configuration, sites, metadata and weights.

    Raises:
        UserError: it is not an adapter, or has another format version.
    """
    with loading_errors(name_or_path), _local_folder(str(name_or_path), **source) as path:
        values = json.loads((path / CONFIG_FILE).read_bytes())
        version = values.pop(FORMAT_KEY)
        if version != FORMAT_VERSION:
            way_out = "upgrade this project" if version > FORMAT_VERSION else "train it again"
            raise UserError(f"{name_or_path}: has format version {version}, not {FORMAT_VERSION}: {way_out}")
        config, shapes = AdapterConfig(**values.pop("adapter")), values.pop("sites")
        return config, shapes, AdapterMetadata.from_json(values), load_file(path / WEIGHTS_FILE)


@contextmanager
def _local_folder(name_or_path: str, **source: Any) -> Iterator[Path]:
    """Yield a local folder with the adapter's configuration and weights."""
    if Path(name_or_path).is_dir():
        yield Path(name_or_path)
    elif name_or_path.startswith(SCHEMES):
        with tempfile.TemporaryDirectory() as copy:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (Path(copy) / name).write_bytes(_from_bucket(f"{name_or_path.rstrip('/')}/{name}"))
            yield Path(copy)
    else:
        yield _from_hub(name_or_path, **source)


def _from_bucket(address: str) -> bytes:
    try:
        return read_object(address)
    except (BaseError, OSError, ValueError) as error:
        raise UserError(f"{address}: cannot be read as a file of an adapter: {first_line(error)}") from error


def _from_hub(repo_id: str, **source: Any) -> Path:
    check_name(repo_id)
    if not REPOSITORY.fullmatch(repo_id):
        raise UserError(f"{repo_id}: no such folder, and not the name of a repository on the hub, OWNER/NAME")
    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **source))
    except (OSError, ValueError) as error:
        raise UserError(f"{repo_id}: no such folder, and no adapter on the hub: {reason(error)}") from error


def push(adapter: AdapterBase, repo_id: str, private: bool | None, token: str | None, commit_message: str) -> str:
    """Upload weights, model card and configuration; return the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        save(adapter, Path(temporary))
        config = Path(temporary) / CONFIG_FILE
        write_json(config, map_strings(json.loads(config.read_bytes()), public))
        return str(api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=commit_message))
