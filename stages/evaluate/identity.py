"""What identifies a part of a pipeline or of a judge: its weights, and the settings that its results depend on."""

from __future__ import annotations

from typing import Any

from torch import nn

from stages.base.denoiser import fingerprint


def identity_of(part: Any) -> list[Any]:
    """The class, weights and settings of a part, and the scalings of the LoRAs in it, for JSON."""
    if not isinstance(part, nn.Module):
        return [type(part).__name__, settings_of(part)]
    # A LoRA's weights do not tell its alpha.
    scalings = {name: found for name, module in part.named_modules() if (found := scaling_of(module))}
    return [type(part).__name__, fingerprint(part), settings_of(part), scalings]


def scaling_of(module: nn.Module) -> dict[str, float]:
    """The factors of a layer's LoRAs, by their names; none if it has no LoRA."""
    scaling = getattr(module, "scaling", None)  # a number in attention layers
    return scaling if isinstance(scaling, dict) else {}


def settings_of(part: Any) -> dict[str, Any]:
    """The configuration of a component of diffusers or transformers; empty if it has none."""
    found = getattr(part, "config", part)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    return without_own(found) if isinstance(found, dict) else {}


def without_own(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out names with an underscore, the libraries' own: one is a set, in another order in each process."""
    return {
        key: without_own(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not str(key).startswith("_")
    }
