"""Real images of a folder: pixels, image files, or rows of a table with prompts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file
from torch import Tensor

from stages.embedded.digits import to_images
from stages.evaluate.retrieval import Captions

PIXELS, TABLE = "reference.safetensors", "reference.parquet"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
ROWS = 100


class ImageFiles:
    """Image files of any size; iterates over their names and paths."""

    captions: Captions | None = None

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((path.name, path) for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """The files' names, sizes and times."""
        return "".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns};" for path in self.paths)


class ImageTable:
    """Rows of a Parquet file with an encoded `image` (bytes, or a struct with `bytes`), a `prompt`, and optionally a
    `category`; iterates over the rows' numbers and their encoded images.

    Raises:
        ValueError: it lacks a column or has another type of images, or a row lacks a text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names = pq.read_schema(path).names
        if missing := [name for name in ("image", "prompt") if name not in names]:
            raise ValueError(f"{path.name} has no column {missing[0]}")
        if not holds_bytes(kind := pq.read_schema(path).field("image").type):
            raise ValueError(f"{path.name}: column image is {kind}, not bytes or a struct with bytes")
        self.captions = Captions(_texts(path, "prompt"), _texts(path, "category") if "category" in names else [])

    def __len__(self) -> int:
        return len(self.captions.prompt_of)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        number = 0
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS, columns=["image"]):
                for image in batch.column("image").to_pylist():
                    number += 1
                    content = image["bytes"] if isinstance(image, dict) else image
                    yield f"row {number} of {self.path.name}", io.BytesIO(content or b"")

    @property
    def fingerprint(self) -> str:
        return ImageFiles([self.path]).fingerprint


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column's type is that of encoded images: bytes, or a struct with `bytes`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _texts(path: Path, column: str) -> list[str]:
    texts = pq.read_table(path, columns=[column]).column(column).to_pylist()
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path.name}: row {number} has no {column}")
    return texts


def read_real_images(folder: Path) -> Tensor | ImageFiles | ImageTable:
    """The real images of a folder: pixels `[m, 1, 32, 32]` in [-1, 1], else its table, else its image files.

    Raises:
        OSError, KeyError, ValueError, SafetensorError, ArrowException: they cannot be read.
    """
    if (folder / PIXELS).is_file():
        return to_images(load_file(folder / PIXELS)["pixels"])
    if (folder / TABLE).is_file():
        return ImageTable(folder / TABLE)
    return ImageFiles(sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES))
