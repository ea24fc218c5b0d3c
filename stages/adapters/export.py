"""Exports a `lora` adapter at one guidance scale to files that other tools load.

`diffusers`: a folder for `pipe.load_lora_weights`. `peft`: a folder for `PeftModel.from_pretrained` and for servers.
`kohya`: a file for ComfyUI and the trainers, for the denoisers in `naming.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from stages.adapters.fusing import LowRank
from stages.adapters.guidance import as_scales
from stages.adapters.header import header, with_header
from stages.adapters.metadata import Base
from stages.adapters.naming import NAMINGS, naming_of
from stages.base.denoiser import fingerprint
from stages.errors import UserError
from stages.storage.files import whole_file, write_json

DIFFUSERS, PEFT, KOHYA = "diffusers", "peft", "kohya"
FORMATS = (DIFFUSERS, PEFT, KOHYA)
LORA_FILE = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks
SUFFIX = ".safetensors"


def export(adapter: AdapterBase, path: Path, guidance_scale: float, format: str) -> Path:
    """Write the adapter at one scale in float32, each file completely or not at all.

    Args:
        path: a folder; for `kohya` a file that ends in `.safetensors`.
        guidance_scale: above 1; outside the trained range it warns.
        format: `diffusers`, `peft` or `kohya`.

    Returns:
        The path of the weights.

    Raises:
        UserError: the adapter is not a LoRA at a fixed scale, or no tool loads the format into this base; nothing is
            written then.
    """
    weights, tensors, implementation = prepared(adapter, path, guidance_scale, format)
    adapter.warn_outside_range(as_scales(guidance_scale))
    file = path if format == KOHYA else path / (LORA_FILE if format == DIFFUSERS else WEIGHTS_FILE)
    fields = header(adapter.metadata, guidance_scale, implementation, fingerprint(adapter))
    content = with_header(tensors, fields | for_diffusers(adapter, weights, format))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={path}: the folder cannot be created: {error.strerror}") from error
    with whole_file(file) as opened:
        opened.write(content)
    if format == PEFT:
        write_json(path / CONFIG_FILE, peft_config(adapter, weights))
    return file


def prepared(
    adapter: AdapterBase, path: Path, guidance_scale: float, format: str
) -> tuple[LowRank, dict[str, Tensor], str]:
    """Return the change of every layer, the file's tensors, and the code whose layer names they use.

    Raises:
        UserError: as `export`.
    """
    weights = weights_of(adapter, guidance_scale, format)
    check_path(path, format)
    if format == DIFFUSERS:
        check_loader(adapter.metadata.base)
    return weights, *named_for_format(adapter, weights, format)


def weights_of(adapter: AdapterBase, guidance_scale: float, format: str) -> LowRank:
    """Return A and B of every layer at one scale, on the CPU.

    Raises:
        UserError: the adapter is not a LoRA at a fixed scale, or the format is unknown.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: one of {', '.join(FORMATS)}")
    if not adapter.fusible:
        raise UserError(
            f"an adapter of the variant {adapter.variant} is not a LoRA: train one with adapter.variant=lora"
        )
    if adapter.config.conditions:
        seen = ", ".join(adapter.config.conditions)
        raise UserError(
            f"the adapter sees {seen} too, a file holds one change for all: train it with adapter.conditions=[]"
        )
    if not (math.isfinite(guidance_scale) and guidance_scale > 1):
        raise UserError(f"guidance_scale={guidance_scale:g}: name a scale above 1; at 1 the adapter changes nothing")
    weights = adapter.lora_weights(guidance_scale)
    return {name: (down.cpu().contiguous(), up.cpu().contiguous()) for name, (down, up) in weights.items()}


def check_path(path: Path, format: str) -> None:
    """
    Raises:
        UserError: the path does not suit the format, or holds an adapter.
    """
    if format == KOHYA:
        if path.suffix != SUFFIX or path.is_dir():
            raise UserError(f"output={path}: format=kohya writes a file: name one that ends in {SUFFIX}")
        return
    if path.suffix == SUFFIX or path.is_file():
        raise UserError(f"output={path}: format={format} writes a folder: name one")
    config = path / CONFIG_FILE
    if config.exists() and '"format_version"' in config.read_text():
        raise UserError(f"output={path}: holds an adapter of this project: name another folder")


def named_for_format(adapter: AdapterBase, weights: LowRank, format: str) -> tuple[dict[str, Tensor], str]:
    """Return the file's tensors by its readers' names, and the code that defines these names."""
    base = adapter.metadata.base
    if format == KOHYA:
        naming = naming_of(base.denoiser_class)
        return naming.renamed(weights), naming.implementation
    prefix = base.denoiser_subfolder if format == DIFFUSERS else "base_model.model"
    tensors = {
        f"{prefix}.{layer}.lora_{part}.weight": tensor
        for layer, change in weights.items()
        for part, tensor in zip("AB", change, strict=True)
    }
    return tensors, "diffusers"


def lora_config(weights: LowRank) -> dict[str, Any]:
    """Return arguments of peft's `LoraConfig`: alpha equals the rank, so the change is B A unscaled."""
    ranks = {layer: len(down) for layer, (down, _) in weights.items()}
    most = max(ranks.values())  # as `r`, because servers allocate by it
    # With ^ a pattern matches the whole name, not a suffix.
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != most}
    return {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }


def peft_config(adapter: AdapterBase, weights: LowRank) -> dict[str, Any]:
    """Return the configuration of a peft folder."""
    base = adapter.metadata.base
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base.pretrained_model_name_or_path,
        "revision": base.revision,
        **lora_config(weights),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def for_diffusers(adapter: AdapterBase, weights: LowRank, format: str) -> dict[str, str]:
    """Return diffusers' header field with the ranks, which some releases infer wrongly if they differ."""
    base = adapter.metadata.base
    if format == PEFT or (format == KOHYA and naming_of(base.denoiser_class).alpha):
        return {}
    config = {f"{base.denoiser_subfolder}.{key}": value for key, value in lora_config(weights).items()}
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(config)}


def how_to_load(adapter: AdapterBase, file: Path, format: str) -> str:
    """Return a line that says what loads an exported file."""
    base = adapter.metadata.base
    part, folder = base.denoiser_subfolder, file.parent
    if format == KOHYA:
        return f"loaded by {naming_of(base.denoiser_class).readers}"
    if format == PEFT:
        return f'loaded by PeftModel.from_pretrained(pipe.{part}, "{folder}")'
    if hasattr(_of_diffusers(base.pipeline_class), "load_lora_weights"):
        return f'loaded by pipe.load_lora_weights("{folder}")'
    return f'loaded by pipe.{part}.load_lora_adapter("{folder}", prefix="{part}", weight_name="{LORA_FILE}")'


def check_loader(base: Base) -> None:
    """
    Raises:
        UserError: diffusers cannot load a LoRA into this base.
    """
    pipeline, denoiser = _of_diffusers(base.pipeline_class), _of_diffusers(base.denoiser_class)
    if not hasattr(pipeline, "load_lora_weights") and not hasattr(denoiser, "load_lora_adapter"):
        others = f"{PEFT} or {KOHYA}" if base.denoiser_class in NAMINGS else PEFT
        raise UserError(
            f"format={DIFFUSERS}: diffusers loads no LoRA into a {base.denoiser_class}: use format={others}"
        )


def _of_diffusers(name: str | None) -> Any:
    return getattr(diffusers, name or "", None)
