"""Previews: a few decoded trajectories beside the dataset, to look at."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO

from PIL import Image
from torch import Tensor

from stages.base.pictures import grid, to_picture
from stages.storage.folder import Folder

PER_ROW = 8


def write_preview(root: Folder, index: int, image: Tensor) -> None:
    """Write one trajectory's image `[c, h, w]` in [-1, 1]."""
    with root.whole_file(f"preview/{index:05d}.png") as file:
        to_picture(image).save(file, format="png")


def write_preview_grid(root: Folder) -> None:
    """Arrange a dataset's previews in `preview.png`, in their order; damaged ones are left out."""
    pictures = []
    for name in root.list("preview"):
        with suppress(OSError, SyntaxError, ValueError):  # Pillow's errors for damaged files
            picture = Image.open(BytesIO(root.read(name) or b""))
            picture.load()
            pictures.append(picture)
    if pictures:
        with root.whole_file("preview.png") as file:
            grid([pictures[i : i + PER_ROW] for i in range(0, len(pictures), PER_ROW)]).save(file, format="png")
