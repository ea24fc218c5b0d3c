"""What an adapter knows of a forward pass besides the tokens: guidance scale, timestep and condition, as one vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

FREQUENCIES = 64


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


class Conditioning(nn.Module):
    """The sum of the embeddings of scale, timestep and condition `[n, hidden]`: computed once per forward, used at every site.

    Args:
        hidden_size: width of the vector.
        conditions: by the denoiser's argument names, what is known of each: `{"class_labels": {"classes": 10}}`.
    """

    def __init__(self, hidden_size: int, conditions: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.scale = ScaleEmbedding(hidden_size)
        self.timestep_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep = TimestepEmbedding(256, hidden_size)
        self.labels = nn.ModuleDict(
            {name: nn.Embedding(about["classes"], hidden_size) for name, about in conditions.items()}
        )

    def forward(self, guidance_scale: Tensor, timestep: Tensor, cond: dict[str, Any]) -> Tensor:
        features = self.timestep_features(timestep).to(self.scale.frequencies.dtype)
        vector = self.scale(guidance_scale) + self.timestep(features)
        for name, table in self.labels.items():
            vector = vector + table(cond[name])
        return nn.functional.silu(vector)
