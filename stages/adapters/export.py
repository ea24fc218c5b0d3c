"""A `lora` adapter at one guidance scale, as files that other tools load without this project.

`diffusers`: a folder for `pipe.load_lora_weights`. `peft`: a folder for `PeftModel.from_pretrained` and for servers.
`kohya`: a file for ComfyUI and the trainers, for the denoisers in `naming.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from stages.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from stages.adapters.fusing import LowRank
from stages.adapters.guidance import as_scales
from stages.adapters.header import header, with_header
from stages.adapters.naming import NAMINGS, naming_of
from stages.errors import UserError
from stages.storage.files import whole_file, write_json

if TYPE_CHECKING:
    from stages.adapters.adapter import GuidanceAdapter

DIFFUSERS, PEFT, KOHYA = "diffusers", "peft", "kohya"
FORMATS = (DIFFUSERS, PEFT, KOHYA)
LORA_FILE = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks
SUFFIX = ".safetensors"


def export(adapter: GuidanceAdapter, path: Path, guidance_scale: float, format: str) -> Path:
    """Write the adapter at one scale, float32, each file whole or not at all.

    Args:
        path: of a folder, or for `kohya` of a file that ends in `.safetensors`.
        guidance_scale: above 1; one outside the trained range warns.
        format: `diffusers`, `peft` or `kohya`.

    Returns:
        The file with the weights.

    Raises:
        UserError: the adapter is no plain LoRA at one scale, or nothing loads the format into this base; nothing is
            written then.
    """
    weights, tensors, implementation = prepared(adapter, path, guidance_scale, format)
    adapter.warn_outside(as_scales(guidance_scale))
    file = path if format == KOHYA else path / (LORA_FILE if format == DIFFUSERS else WEIGHTS_FILE)
    header_fields = header(adapter, guidance_scale, implementation) | for_diffusers(adapter, weights, format)
    content = with_header(tensors, header_fields)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={path}: no folder can be made there: {error.strerror}") from error
    with whole_file(file) as opened:
        opened.write(content)
    if format == PEFT:
        write_json(path / CONFIG_FILE, peft_config(adapter, weights))
    return file


def prepared(
    adapter: GuidanceAdapter, path: Path, guidance_scale: float, format: str
) -> tuple[LowRank, dict[str, Tensor], str]:
    """The change of every layer, the tensors of the file, and the code whose names they have.

    Raises:
        UserError: as `export`.
    """
    weights = weights_of(adapter, guidance_scale, format)
    check_path(path, format)
    if format == DIFFUSERS:
        check_loader(adapter.metadata["base"])
    return weights, *named_for_format(adapter, weights, format)


def weights_of(adapter: GuidanceAdapter, guidance_scale: float, format: str) -> LowRank:
    """A and B of every layer at one scale, on the CPU.

    Raises:
        UserError: it is no plain LoRA at one scale, or there is no such format.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: one of {', '.join(FORMATS)}")
    if not adapter.fusible:
        raise UserError(f"an adapter of the variant {adapter.variant} is no LoRA: train one with adapter.variant=lora")
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
        UserError: the format is not written there.
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


def named_for_format(adapter: GuidanceAdapter, weights: LowRank, format: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by the names that its readers know, and the code whose names they are."""
    base = adapter.metadata["base"]
    if format == KOHYA:
        naming = naming_of(base["denoiser_class"])
        return naming.renamed(weights), naming.implementation
    prefix = base["denoiser_subfolder"] if format == DIFFUSERS else "base_model.model"
    tensors = {
        f"{prefix}.{layer}.lora_{part}.weight": tensor
        for layer, change in weights.items()
        for part, tensor in zip("AB", change, strict=True)
    }
    return tensors, "diffusers"


def lora_config(weights: LowRank) -> dict[str, Any]:
    """What peft makes its `LoraConfig` of: alpha is the rank, so that the change is B A as it stands."""
    ranks = {layer: len(down) for layer, (down, _) in weights.items()}
    most = max(ranks.values())  # the one in front, because servers make room by it
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != most}  # ^: the whole name, no ending of one
    return {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }


def peft_config(adapter: GuidanceAdapter, weights: LowRank) -> dict[str, Any]:
    """The configuration in a folder of peft's."""
    base = adapter.metadata["base"]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base["pretrained_model_name_or_path"],
        "revision": base.get("revision"),
        **lora_config(weights),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def for_diffusers(adapter: GuidanceAdapter, weights: LowRank, format: str) -> dict[str, str]:
    """What diffusers reads in the header: the ranks, which some of its releases guess wrongly where they differ."""
    base = adapter.metadata["base"]
    if format == PEFT or (format == KOHYA and naming_of(base["denoiser_class"]).alpha):
        return {}
    config = {f"{base['denoiser_subfolder']}.{key}": value for key, value in lora_config(weights).items()}
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(config)}


def how_to_load(adapter: GuidanceAdapter, file: Path, format: str) -> str:
    """What loads an exported file, in a line."""
    base = adapter.metadata["base"]
    part, folder = base["denoiser_subfolder"], file.parent
    if format == KOHYA:
        return f"loaded by {naming_of(base['denoiser_class']).readers}"
    if format == PEFT:
        return f'loaded by PeftModel.from_pretrained(pipe.{part}, "{folder}")'
    if hasattr(_of_diffusers(base.get("pipeline_class")), "load_lora_weights"):
        return f'loaded by pipe.load_lora_weights("{folder}")'
    return f'loaded by pipe.{part}.load_lora_adapter("{folder}", prefix="{part}", weight_name="{LORA_FILE}")'


def check_loader(base: dict[str, Any]) -> None:
    """
    Raises:
        UserError: diffusers loads no LoRA into this base.
    """
    pipeline, denoiser = _of_diffusers(base.get("pipeline_class")), _of_diffusers(base["denoiser_class"])
    if not hasattr(pipeline, "load_lora_weights") and not hasattr(denoiser, "load_lora_adapter"):
        others = f"{PEFT} or {KOHYA}" if base["denoiser_class"] in NAMINGS else PEFT
        raise UserError(
            f"format={DIFFUSERS}: diffusers loads no LoRA into a {base['denoiser_class']}: take format={others}"
        )


def _of_diffusers(name: str | None) -> Any:
    return getattr(diffusers, name or "", None)
