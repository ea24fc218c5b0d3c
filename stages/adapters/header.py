"""The header of an exported file: its content and its origin.

The fields are those of Stability AI's model metadata standard (github.com/Stability-AI/ModelSpec), which user
interfaces show, and this project's own: `guidance.*`.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from typing import Any

import safetensors.torch
from torch import Tensor

from stages.adapters.metadata import AdapterMetadata
from stages.base.places import short_name

# As sd-scripts and musubi-tuner write them; for other bases, the denoiser's class.
ARCHITECTURES = {
    "SD3Transformer2DModel": "stable-diffusion-3",
    "ChromaTransformer2DModel": "chroma",
    "WanTransformer3DModel": "wan2.1",
    "QwenImageTransformer2DModel": "Qwen-Image",
}
UNET_ARCHITECTURES: dict[tuple[Any, Any], str] = {  # by width of the text tokens and prediction type
    (768, "epsilon"): "stable-diffusion-v1",
    (1024, "epsilon"): "stable-diffusion-v2-512",
    (1024, "v_prediction"): "stable-diffusion-v2-768-v",
    (2048, "epsilon"): "stable-diffusion-xl-v1-base",
}
PREDICTIONS = {"v_prediction": "v"}  # the standard's names, where they differ


def with_header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file with the hash of its tensors in the header."""
    plain = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    digest = hashlib.sha256(memoryview(plain)[start:]).hexdigest()
    return safetensors.torch.save(tensors, metadata | {"modelspec.hash_sha256": f"0x{digest}"})


def header(metadata: AdapterMetadata, guidance_scale: float, implementation: str, fingerprint: str) -> dict[str, str]:
    """Return the header's fields.

    Args:
        implementation: the code whose layer names the file uses; fingerprint: of the adapter's weights.
    """
    name, (low, high) = short_name(metadata.base.pretrained_model_name_or_path), metadata.scale_range
    fields = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture(metadata)}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": f"One-pass guidance at scale {guidance_scale:g} for {name}",
        "modelspec.description": f"Classifier-free guidance at scale {guidance_scale:g} in one conditional pass of "
        f"{name} (adapter guidance distillation, arXiv 2503.07274).",
        "modelspec.usage_hint": "Turn the pipeline's own guidance off: scale 1.",
        "modelspec.tags": "guidance-distillation, classifier-free-guidance",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "guidance.base_model": name,
        "guidance.base_fingerprint": metadata.base.denoiser_fingerprint,
        "guidance.scale": f"{guidance_scale:g}",
        "guidance.trained_range": f"{low:g},{high:g}",
        "guidance.gain": str(metadata.guidance_gain),
        "guidance.adapter_fingerprint": fingerprint,
        "guidance.dial": dial(metadata, guidance_scale),
    }
    if prediction := metadata.prediction_type:
        fields["modelspec.prediction_type"] = PREDICTIONS.get(prediction, prediction)
    return {field: text for field, text in fields.items() if text is not None}


def architecture(metadata: AdapterMetadata) -> str:
    """Return the trainers' name for the base's architecture."""
    kind, tokens = metadata.base.denoiser_class, metadata.conditions.get("encoder_hidden_states", {})
    seen = tokens.get("width"), metadata.prediction_type
    if kind == "UNet2DConditionModel":
        return UNET_ARCHITECTURES.get(seen, kind)
    return ARCHITECTURES.get(kind, kind)


def dial(metadata: AdapterMetadata, guidance_scale: float) -> str | None:
    """Return the measured effective scale of each strength as JSON; None if it was not measured."""
    table = metadata.dial.get(f"{guidance_scale:g}")
    return None if table is None else json.dumps(table)
