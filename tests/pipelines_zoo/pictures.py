"""Pictures for pipelines that edit one or start from one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from stages.base.pictures import to_picture


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pictures-")  # deleted when the interpreter ends


@functools.cache
def picture(seed: int = 0, size: int = 32) -> str:
    """Return the path of a PNG file `[size, size]` of coloured squares."""
    squares = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    path = Path(_folder().name, f"{seed}-{size}.png")
    to_picture(squares).resize((size, size), 0).save(path)
    return str(path)


@functools.cache
def mask(size: int = 32) -> str:
    """Return the path of a PNG file `[size, size]` whose right half is white."""
    half = (torch.arange(size) >= size // 2).float().expand(1, size, size) * 2 - 1
    path = Path(_folder().name, f"mask-{size}.png")
    to_picture(half).save(path)
    return str(path)


@functools.cache
def video(seed: int = 0, frames: int = 5, size: int = 32) -> str:
    """Return the path of a GIF file of coloured squares that change from frame to frame, each `[size, size]`."""
    noise = torch.rand(frames, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    first, *rest = [to_picture(squares).resize((size, size), 0) for squares in noise]
    path = Path(_folder().name, f"{seed}-{frames}-{size}.gif")
    first.save(path, save_all=True, append_images=rest)
    return str(path)
