"""A few decoded trajectories beside the dataset, so that someone can look at what the teacher makes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from stages.pictures import grid, to_picture
from stages.records.storage import whole_file

PER_ROW = 8


def write_preview(root: Path, index: int, image: Tensor) -> None:
    """Keep one trajectory's image `[c, h, w]` in [-1, 1]."""
    with whole_file(root / "preview" / f"{index:05d}.png") as file:
        to_picture(image).save(file, format="png")


def write_preview_grid(root: Path) -> None:
    """Put all previews of a dataset into `preview.png`, in their order."""
    pictures = [Image.open(path) for path in sorted((root / "preview").glob("*.png"))]
    if pictures:
        with whole_file(root / "preview.png") as file:
            grid([pictures[i : i + PER_ROW] for i in range(0, len(pictures), PER_ROW)]).save(file, format="png")
