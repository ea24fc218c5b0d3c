"""Copies of pictures that are mirrored, turned, made smaller and moved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_ANGLE = 0.15  # radians
SMALLEST_SIZE = 0.85
LARGEST_SHIFT = 0.1  # of half the width


def mirror_some(images: Tensor, allowed: Tensor) -> Tensor:
    """Mirror about half of the images that may be mirrored."""
    mirrored = allowed & (torch.rand(len(images)) < 0.5)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def transformed(images: Tensor) -> Tensor:
    """Turn, shrink and move each image `[n, 3, h, w]` in [-1, 1] at random, on white.

    A denoiser that knows the exact place of each stroke from the prompt alone learns the pictures by heart.
    """
    n = len(images)
    angle, size = LARGEST_ANGLE * uniform(n), 1 / (1 - (1 - SMALLEST_SIZE) * torch.rand(n))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
    shift = LARGEST_SHIFT * torch.stack([uniform(n), uniform(n)], dim=1)
    places = functional.affine_grid(
        torch.cat([size.view(n, 1, 1) * turn, shift[:, :, None]], dim=2), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images - 1, places, "bicubic", align_corners=False).clamp(-2, 0) + 1


def uniform(n: int) -> Tensor:
    """`[n]` between -1 and 1."""
    return 2 * torch.rand(n) - 1
