"""The effective scale: the CFG scale whose samples are nearest to given samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_distances(latents: Tensor, measured: Sequence[Tensor]) -> Tensor:
    """Mean squared distances `[n, k]`, in double precision, of n images' latents to those of CFG at k scales.

    Args:
        latents: `[n, ...]`.
        measured: the latents of CFG from the same noise, each `[n, ...]`.
    """
    return torch.stack([(latents - guided).double().square().flatten(1).mean(dim=1) for guided in measured], dim=1)


def effective_scale(distances: Sequence[float], between: Sequence[float], scales: Sequence[float]) -> float:
    """The CFG scale whose samples are nearest to the given samples.

    Between adjacent measured scales, CFG's latents are taken as linear in the scale. The result lies within the
    measured scales. Means over images suffice as input.

    Args:
        distances: `[k]`, mean squared distances of the samples to CFG at each of k scales.
        between: `[k - 1]`, mean squared distances of CFG at each scale to CFG at the next.
        scales: `[k]`, ascending; the first is 1, no guidance.
    """
    found = []
    for i, length in enumerate(between):
        along = (distances[i] + length - distances[i + 1]) / 2  # <x - a, b - a>
        share = min(max(along / length, 0.0), 1.0) if length else 0.0
        left = distances[i] - 2 * share * along + share**2 * length
        found.append((left, scales[i] + share * (scales[i + 1] - scales[i])))
    return min(found)[1]
