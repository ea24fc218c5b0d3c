"""What can be measured of a digit's picture, and the words for it: so that prompt adherence needs no large model."""

from __future__ import annotations

import torch
from torch import Tensor

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "regular", "bold")
SLANTS = ("leaning left", "upright", "leaning right")
# The terciles of the training digits, so that each word is said of about a third of them.
STROKE_BOUNDS = (2.14, 2.61)
SLANT_BOUNDS = (0.02, 0.28)


def stroke_width(images: Tensor) -> Tensor:
    """Mean stroke width in pixels `[n]` of images `[n, 1, h, w]` in [-1, 1]: twice the ink over the length of its edges."""
    ink = (images[:, 0] + 1) / 2
    down, right = ink.diff(dim=1)[:, :, :-1], ink.diff(dim=2)[:, :-1]
    return 2 * ink.sum((1, 2)) / (down.square() + right.square()).sqrt().sum((1, 2)).clamp(min=1e-6)


def slant(images: Tensor) -> Tensor:
    """Horizontal shear `[n]` of images `[n, 1, h, w]` in [-1, 1], from their second moments; positive leans right."""
    ink = (images[:, 0] + 1) / 2
    ink = ink / ink.sum((1, 2), keepdim=True).clamp(min=1e-6)
    y = torch.arange(ink.shape[1], device=ink.device).view(1, -1, 1)
    x = torch.arange(ink.shape[2], device=ink.device).view(1, 1, -1)
    y = y - (ink * y).sum((1, 2), keepdim=True)
    x = x - (ink * x).sum((1, 2), keepdim=True)
    return -(ink * x * y).sum((1, 2)) / (ink * y * y).sum((1, 2)).clamp(min=1e-6)


def attributes(images: Tensor) -> Tensor:
    """Indices `[n, 2]` into `STROKES` and `SLANTS` of images `[n, 1, h, w]` in [-1, 1]."""
    strokes = torch.bucketize(stroke_width(images), torch.tensor(STROKE_BOUNDS, device=images.device), right=True)
    slants = torch.bucketize(slant(images), torch.tensor(SLANT_BOUNDS, device=images.device), right=True)
    return torch.stack([strokes, slants], dim=1)


def caption(label: int, stroke: int, slant: int) -> str:
    """`"a bold seven leaning right"`."""
    return f"a {STROKES[stroke]} {NUMERALS[label]} {SLANTS[slant]}"


def read_caption(text: str) -> tuple[int, int, int] | None:
    """(class, stroke, slant) that a caption tells, or None where it is no caption of ours."""
    captions = {
        caption(label, stroke, slant): (label, stroke, slant)
        for label in range(len(NUMERALS))
        for stroke in range(len(STROKES))
        for slant in range(len(SLANTS))
    }
    return captions.get(text)
