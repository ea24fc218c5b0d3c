"""Weights in one file: a checkpoint of a whole pipeline or of a denoiser alone, or a denoiser in GGUF.

The file's configuration comes from a folder or a hub id of the same pipeline, where diffusers would ask the hub for the
one of the model that it takes the file for.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from stages.errors import UserError

GGUF = ".gguf"
SINGLE_FILES = (".safetensors", ".ckpt", GGUF)
# How the names of a VAE's and of text encoders' weights begin in checkpoints of whole pipelines.
OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def is_single_file(name_or_path: str) -> bool:
    return name_or_path.lower().endswith(SINGLE_FILES) and not Path(name_or_path).is_dir()


def is_gguf(name_or_path: str) -> bool:
    return is_single_file(name_or_path) and name_or_path.lower().endswith(GGUF)


def check_file_of_weights(path: str, config: str) -> None:
    """
    Raises:
        UserError: there is no such file, its configuration is not given, or its library is not installed.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if not config:
        raise UserError(
            f"{path}: a file holds weights alone: name a folder or a hub id with the pipeline's configuration "
            "(teacher.config=...)"
        )
    if is_gguf(path) and importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path}: gguf is not installed: pip install '.[gguf]'")


def denoiser_of_file(path: str, config: str, subfolder: str, kind: Any, torch_dtype: torch.dtype) -> nn.Module:
    """Load a denoiser of this class; a GGUF file's stays quantised, and computes in the dtype.

    Raises:
        UserError: as `check_file_of_weights`, or diffusers loads no such class from a file.
    """
    check_file_of_weights(path, config)
    quantized = {"quantization_config": GGUFQuantizationConfig(compute_dtype=torch_dtype)} if is_gguf(path) else {}
    return _from_single_file(path, config, kind, subfolder=subfolder, torch_dtype=torch_dtype, **quantized)


def _from_single_file(path: str, config: str, kind: Any, **options: Any) -> Any:
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"{path}: diffusers loads no {kind.__name__} from one file: name a folder")
    try:
        return kind.from_single_file(path, config=config, **options)
    except Exception as error:  # diffusers' conversions of other weights may raise anything
        raise ValueError(f"its weights do not fit {config}: {error}") from error


def pipeline_of_file(path: str, config: str, class_name: str | None, torch_dtype: torch.dtype) -> Any:
    """Load a pipeline; parts that the file lacks come from where its configuration is.

    Raises:
        UserError: as `denoiser_of_file`.
    """
    check_file_of_weights(path, config)
    index = DiffusionPipeline.load_config(config)
    kind = getattr(diffusers, class_name or index["_class_name"])
    if holds_a_pipeline(path):
        return _from_single_file(path, config, kind, torch_dtype=torch_dtype)
    name = next(name for name in ("transformer", "unet") if name in index)
    denoiser = denoiser_of_file(path, config, name, getattr(diffusers, index[name][1]), torch_dtype)
    absent = {part: None for part, entry in index.items() if entry == [None, None]}
    return kind.from_pretrained(config, torch_dtype=torch_dtype, **absent, **{name: denoiser})


def holds_a_pipeline(path: str) -> bool:
    """Whether a checkpoint holds more than a denoiser; one that is not in safetensors does, as a rule."""
    if is_gguf(path):
        return False
    if not path.lower().endswith(".safetensors"):
        return True
    try:
        with safe_open(path, "pt") as file:
            return any(name.startswith(OTHER_PARTS) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
