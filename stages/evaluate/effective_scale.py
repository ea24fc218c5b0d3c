"""The effective scale: how much guidance samples show, whatever they were asked for, told as a scale of CFG."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_distances(latents: Tensor, measured: Sequence[Tensor]) -> Tensor:
    """Mean squared distances `[n, k]`, in double precision, of n images' latents to those of CFG at k scales.

    Args:
        latents: `[n, ...]`; measured: of CFG from the same noise, each `[n, ...]`.
    """
    return torch.stack([(latents - guided).double().square().flatten(1).mean(dim=1) for guided in measured], dim=1)


def effective_scale(distances: Sequence[float], between: Sequence[float], scales: Sequence[float]) -> float:
    """The CFG scale whose samples some others are nearest to.

    Between two neighbouring measured scales CFG's latents are taken as linear in the scale, a straight segment for all
    images together. What lies beyond the measured scales is told as the lowest or the highest of them.

    Args:
        distances: `[k]`, mean squared distances of the samples to CFG at each of k scales; only these and `between` are
            needed, so that means over images suffice.
        between: `[k - 1]`, those of CFG at each scale to CFG at the next.
        scales: `[k]`, rising, the first 1: no guidance.
    """
    found = []
    for i, length in enumerate(between):
        along = (distances[i] + length - distances[i + 1]) / 2  # <x - a, b - a>
        share = min(max(along / length, 0.0), 1.0) if length else 0.0
        left = distances[i] - 2 * share * along + share**2 * length
        found.append((left, scales[i] + share * (scales[i + 1] - scales[i])))
    return min(found)[1]
