"""Weights in one file: a checkpoint of a whole pipeline or of a denoiser alone, or a denoiser in GGUF.

The file's configuration comes from a folder or a hub id of the same pipeline, where diffusers would ask the hub for the
one of the model that it takes the file for.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from stages.errors import UserError

GGUF, SAFETENSORS = ".gguf", ".safetensors"
SINGLE_FILES = (SAFETENSORS, ".ckpt", GGUF)
LORA = re.compile(r"(^|[._])lora[._]")  # in the names of a LoRA's weights
Shapes = dict[str, tuple[int, ...]]
# How the names of a VAE's and of text encoders' weights begin in checkpoints of whole pipelines.
OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def is_single_file(name_or_path: str) -> bool:
    return name_or_path.lower().endswith(SINGLE_FILES) and not Path(name_or_path).is_dir()


def is_gguf(name_or_path: str) -> bool:
    return is_single_file(name_or_path) and name_or_path.lower().endswith(GGUF)


def check_file_of_weights(path: str, config: str) -> None:
    """
    Raises:
        UserError: there is no such file, its configuration is not given, its library is not installed, or it holds
            a LoRA or nothing.
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
    if is_safetensors(path):
        shapes = shapes_in(path)
        if not shapes:
            raise UserError(f"{path}: holds no weights")
        lora = [name for name in shapes if LORA.search(name)]
        if len(lora) > len(shapes) / 2:
            raise UserError(
                f"{path}: holds a LoRA ({lora[0]}): name a file with the weights of a pipeline or a denoiser"
            )


def is_safetensors(path: str) -> bool:
    return path.lower().endswith(SAFETENSORS)


def shapes_in(path: str) -> Shapes:
    """The shapes of a safetensors file's weights by name, from its header.

    Raises:
        UserError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error


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
        loaded = kind.from_single_file(path, config=config, **options)
        if isinstance(loaded, nn.Module) and any(weight.is_meta for weight in loaded.parameters()):
            raise ValueError("it lacks some of them")
        return loaded
    except OSError:  # the file, or the configuration, cannot be read
        raise
    except Exception as error:  # diffusers' conversions of other weights may raise anything
        found = difference(path, config, kind, options.get("subfolder")) or str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: no {kind.__name__} could be loaded from it: its weights do not fit {config}: {found}"
        ) from error


def difference(path: str, config: str, kind: Any, subfolder: str | None) -> str | None:
    """How the weights in a safetensors file differ from those of a denoiser; None if it tells nothing.

    Args:
        subfolder: of the denoiser in the configuration; None for a whole pipeline.
    """
    if subfolder is None or not is_safetensors(path):
        return None
    with torch.device("meta"):
        denoiser = kind.from_config(kind.load_config(config, subfolder=subfolder))
    expected = {name: tuple(weight.shape) for name, weight in denoiser.state_dict().items()}
    found = shapes_in(path)
    if found.keys().isdisjoint(expected):
        return f"their names are others: the first is {next(iter(found))}"
    for name, shape in expected.items():
        if (there := found.get(name)) != shape:
            return f"{name} has shape {list(there)}, not {list(shape)}" if there else f"{name} is missing"
    return next((f"{name} is one too many" for name in found if name not in expected), None)


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
    if not is_safetensors(path):
        return not is_gguf(path)
    return any(name.startswith(OTHER_PARTS) for name in shapes_in(path))
