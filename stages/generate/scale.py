"""A guidance scale per sample, for pipelines that take one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GUIDES = 2.0  # a number above 1, so that a pipeline runs both passes


class PerSampleScale(float):
    """A float whose product with a batch scales each sample by its own factor.

    Pipelines and guiders compute `scale * tensor` with `tensor [n, ...]`, and Python asks the left factor first. So the
    pipeline's own guidance rule stays in effect. `find_layout` tries out whether a pipeline computes it like this.
    """

    values: Tensor

    def __new__(cls, values: Tensor) -> PerSampleScale:
        """
        Args:
            values: `[n]`.
        """
        scale = super().__new__(cls, GUIDES)
        scale.values = values
        return scale

    def __sub__(self, other: Any) -> Any:
        return PerSampleScale(self.values - other) if isinstance(other, (int, float)) else float(self) - other

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor) or other.ndim == 0:
            return float(self) * other
        if len(other) != len(self.values):
            raise ValueError(f"{len(self.values)} guidance scales for a batch of {len(other)}")
        precise = torch.promote_types(other.dtype, torch.float32)
        weights = self.values.to(other.device, precise).view(-1, *[1] * (other.ndim - 1))
        return (weights * other.to(precise)).to(other.dtype)
