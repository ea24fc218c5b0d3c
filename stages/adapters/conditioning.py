"""What an adapter knows of a forward pass besides the tokens: guidance scale, timestep and condition, as one vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

FREQUENCIES = 64
LABEL, POOLED, TOKENS = "label", "pooled", "tokens"
SMALLEST_EMBEDDING = 16  # what is narrower is no embedding: image sizes, crops


class ScaleEmbedding(nn.Module):
    """Guidance scales `[n]` to vectors `[n, hidden]`, through Fourier features of log w.

    The random frequencies (arXiv 2006.10739) are a buffer that is saved with the weights; log w itself is among the
    features, so that the embedding goes on smoothly beyond the scales of the training.
    """

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(FREQUENCIES))
        self.project = TimestepEmbedding(2 * FREQUENCIES + 1, hidden_size)

    def forward(self, guidance_scale: Tensor) -> Tensor:
        log_scale = guidance_scale.float().log()[:, None]
        angles = 2 * math.pi * log_scale * self.frequencies.float()
        features = torch.cat([log_scale, angles.cos(), angles.sin()], dim=1)
        return self.project(features.to(self.frequencies.dtype))


def find_conditions(tensors: dict[str, dict[str, Any]], num_classes: int) -> dict[str, dict[str, Any]]:
    """What of a record an adapter is conditioned on, found by dtype and shape.

    A class if there is one, else the widest pooled embedding, else the token embeddings.

    Args:
        tensors: dtype and shape of the conditional inputs by the denoiser's own names.
        num_classes: how many rows a table of classes needs.

    Returns:
        The one condition by its name: `{"class_labels": {"kind": "label", "classes": 10}}`, or its kind and width.
    """
    tensors = {name: told for name, told in tensors.items() if not name.endswith("mask")}
    labels = {name: told for name, told in tensors.items() if told["shape"] == [] and "int" in told["dtype"]}
    if labels:
        return {name: {"kind": LABEL, "classes": num_classes} for name in list(labels)[:1]}
    for kind, rank in ((POOLED, 1), (TOKENS, 2)):
        fitting = {
            name: told["shape"][-1]
            for name, told in tensors.items()
            if len(told["shape"]) == rank and "float" in told["dtype"] and told["shape"][-1] >= SMALLEST_EMBEDDING
        }
        if fitting:
            name = max(fitting, key=lambda name: fitting[name])
            return {name: {"kind": kind, "width": fitting[name]}}
    return {}


class ConditionEmbedding(nn.Module):
    """One condition of a forward pass to vectors `[n, hidden]`: a class by a table, an embedding by a projection."""

    def __init__(self, about: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.kind = about["kind"]
        if self.kind == LABEL:
            self.project: nn.Module = nn.Embedding(about["classes"], hidden_size)
        else:
            self.project = nn.Sequential(nn.LayerNorm(about["width"]), nn.Linear(about["width"], hidden_size))

    def forward(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            value: `[n]` classes, `[n, width]` pooled or `[n, length, width]` token embeddings.
            mask: `[n, length]`, which tokens count; all where there is none.
        """
        if self.kind == LABEL:
            return self.project(value)
        value = value.to(self.project[1].weight.dtype)  # type: ignore[index]
        if self.kind == TOKENS:
            weights = torch.ones_like(value[..., :1]) if mask is None else mask[..., None].to(value.dtype)
            value = (value * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.project(value)


class Conditioning(nn.Module):
    """The sum of the embeddings of scale, timestep and condition `[n, hidden]`: computed once per forward, used at every site.

    Args:
        hidden_size: width of the vector.
        conditions: by the denoiser's argument names, as `find_conditions` tells them.
        timestep_scale: the denoiser's timestep over the scheduler's, which counts to 1000.
    """

    def __init__(self, hidden_size: int, conditions: dict[str, dict[str, Any]], timestep_scale: float) -> None:
        super().__init__()
        self.timestep_scale = timestep_scale
        self.scale = ScaleEmbedding(hidden_size)
        self.timestep_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep = TimestepEmbedding(256, hidden_size)
        self.names = list(conditions)
        self.conditions = nn.ModuleList(ConditionEmbedding(about, hidden_size) for about in conditions.values())

    def forward(self, guidance_scale: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """
        Args:
            guidance_scale: `[n]`.
            timestep: `[n]`, as the denoiser is given it.
            inputs: the denoiser's arguments, flat.
        """
        features = self.timestep_features(timestep.float() / self.timestep_scale).to(self.scale.frequencies.dtype)
        vector = self.scale(guidance_scale) + self.timestep(features)
        for name, embedding in zip(self.names, self.conditions, strict=True):
            vector = vector + embedding(inputs[name], mask_of(name, inputs))
        return nn.functional.silu(vector)


def mask_of(name: str, inputs: dict[str, Any]) -> Tensor | None:
    """The mask `[n, length]` beside token embeddings `[n, length, width]`, whatever the denoiser calls it."""
    shape = inputs[name].shape[:2]
    masks = [value for key, value in inputs.items() if key.endswith("mask") and isinstance(value, Tensor)]
    return next((mask for mask in masks if mask.shape == shape), None)
