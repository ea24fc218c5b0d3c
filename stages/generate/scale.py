"""One guidance scale per sample, where pipelines take one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GUIDES = 2.0  # any number above 1 makes a pipeline run both passes


class PerSampleScale(float):
    """A number to a pipeline, which weighs each sample of a batch with a scale of its own.

    Pipelines and guiders write their guidance as `scale * tensor` with `tensor [n, ...]`, and Python asks the left factor
    first. So the guidance of a pipeline acts as it is, whatever else it does, and none of it is written here again.
    Whether a pipeline does write it so is tried before anything is recorded (`stages.generate.layout`).
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
