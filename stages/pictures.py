"""Tensors as pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

SMALL, ENLARGED = 64, 2


def to_picture(image: Tensor) -> Image.Image:
    """One image `[channels, height, width]` in [-1, 1] as a picture."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, as one picture; small ones are enlarged."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * max(len(row) for row in rows), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    times = ENLARGED if width < SMALL else 1
    return sheet.resize((sheet.width * times, sheet.height * times), Image.Resampling.NEAREST)
