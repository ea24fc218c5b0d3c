"""Tensors to pictures, and the input pictures of pipelines."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from stages.errors import UserError
from stages.storage.bucket import read_object

SMALL, ENLARGED = 64, 2
PICTURES = ("image", "mask_image", "video")  # arguments of pipelines; a condition of the same name is a path
READERS = 16  # pictures read at once


def to_picture(image: Tensor) -> Image.Image:
    """One image `[channels, height, width]` in [-1, 1] as a picture."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Arrange pictures in rows of one picture, each in a place of the largest one's size, and enlarge small ones."""
    width, height = (max(picture.size[i] for row in rows for picture in row) for i in range(2))
    sheet = Image.new("RGB", (width * max(len(row) for row in rows), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    times = ENLARGED if width < SMALL else 1
    return sheet.resize((sheet.width * times, sheet.height * times), Image.Resampling.NEAREST)


class PicturePath(str):
    """A picture's path as a row of prompts gives it; it compares as that text, wherever the files are.

    Attributes:
        place: the picture's address or path; a relative path is beside the prompts, else in the working directory.
    """

    place: str

    def __new__(cls, named: str, folder: str = "") -> PicturePath:
        """
        Args:
            folder: of the prompts, on disk or in a bucket; empty where they come from the command line.
        """
        path = super().__new__(cls, named)
        path.place = named if "://" in named else str(Path(named).expanduser())
        if "://" not in named and not Path(path.place).is_absolute():
            if "://" in folder:
                path.place = f"{folder}/{named}"
            elif (beside := Path(folder, path.place)).exists():
                path.place = str(beside)
        return path

    def content(self) -> bytes:
        return read_object(self.place) if "://" in self.place else Path(self.place).read_bytes()


def open_picture(name: str, path: str) -> Any:
    """Open a pipeline's input picture, upright and in RGB; for `video`, every frame of a GIF, WebP or PNG.

    Raises:
        UserError: it cannot be read.
    """
    known = path if isinstance(path, PicturePath) else PicturePath(path)
    try:
        with Image.open(io.BytesIO(known.content())) as picture:
            if name == "video":
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, obstore.exceptions.BaseError) as error:
        wanted = "a moving picture (GIF, WebP or PNG)" if name == "video" else "a picture"
        message = str(error).splitlines()[0].replace(f": '{known.place}'", "").removeprefix("[Errno 2] ")
        raise UserError(f"{name}={path}: {known.place} is not readable as {wanted}: {message}") from error


def check_pictures(conditions: Sequence[Mapping[str, Any]], named: str, of_one_size: bool) -> None:
    """Open every picture before any is used.

    Args:
        named: their source, for errors.
        of_one_size: whether all must have one size, because the pipeline makes images of that size.

    Raises:
        UserError: a picture cannot be read, or has another size than the first; names its row.
    """
    asked = [(i, name, c[name]) for i, c in enumerate(conditions, start=1) for name in PICTURES if name in c]
    first: dict[str, str] = {}
    for (row, name, path), size in zip(asked, _sizes(asked, named), strict=True):
        if of_one_size and first.setdefault(name, size) != size:
            raise UserError(
                f"{named}: row {row}: {name}={path}: is {size}, the first is {first[name]}: give pictures of one size"
            )


def _sizes(asked: Sequence[tuple[int, str, str]], named: str) -> Iterator[str]:
    def size_of(one: tuple[int, str, str]) -> str:
        row, name, path = one
        try:
            picture = open_picture(name, path)
        except UserError as error:
            raise UserError(f"{named}: row {row}: {error}") from error
        if name != "video":
            return f"{picture.width}x{picture.height}"
        return f"{len(picture)} frames of {picture[0].width}x{picture[0].height}"

    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(size_of, asked)
