from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stages.base.pictures import to_picture
from stages.evaluate.real_images import ImageFiles, ImageTable, read_real_images

COLOURS = ("red", "blue", "white")


def encoded(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="png")
    return content.getvalue()


def write_table(folder: Path, images: list[Any], **columns: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images} | columns), folder / "reference.parquet")
    return folder


def write_digits(folder: Path, count: int) -> torch.Tensor:
    """Write a table of digits with the prompts `picture NUMBER` and two categories; return them `[n, 1, 32, 32]`."""
    digits = read_real_images(Path("stages/embedded/digits"))
    assert isinstance(digits, torch.Tensor)
    numbers = range(count)
    write_table(
        folder,
        [encoded(to_picture(image)) for image in digits[:count]],
        prompt=[f"picture {i}" for i in numbers],
        category=["even" if i % 2 == 0 else "odd" for i in numbers],
    )
    return digits[:count]


def test_a_table_holds_pictures_prompts_and_categories(tmp_path: Path) -> None:
    pictures = [encoded(Image.new("RGB", (8, 8), colour)) for colour in COLOURS]
    for images in (pictures, [{"bytes": content, "path": "a.png"} for content in pictures]):
        table = read_real_images(write_table(tmp_path, images, prompt=list(COLOURS), category=["warm", "cold", "cold"]))
        assert isinstance(table, ImageTable)
        assert len(table) == 3
        assert [Image.open(content).getpixel((0, 0)) for _, content in table][:2] == [(255, 0, 0), (0, 0, 255)]
        assert [name for name, _ in table][2] == "row 3 of reference.parquet"
        assert table.captions.prompts == list(COLOURS)
        assert table.captions.category_of.tolist() == [0, 1, 1]  # type: ignore[union-attr]
    assert read_real_images(write_table(tmp_path, pictures, prompt=["x"] * 3)).captions.category_of is None  # type: ignore[union-attr]


def test_a_table_that_lacks_a_column_or_a_text_is_refused(tmp_path: Path) -> None:
    for columns, message in (
        ({"text": ["a", "b"]}, "reference.parquet has no column prompt"),
        ({"prompt": ["a", None]}, "reference.parquet: row 2 has no prompt"),
        ({"prompt": [" ", "b"]}, "reference.parquet: row 1 has no prompt"),
        ({"prompt": [1, 2]}, "reference.parquet: row 1 has no prompt"),
        ({"prompt": ["a", "b"], "category": ["x", None]}, "reference.parquet: row 2 has no category"),
    ):
        write_table(tmp_path, [b"", b""], **columns)
        with pytest.raises(ValueError, match=message):
            read_real_images(tmp_path)


@pytest.mark.parametrize("image", ["text", 3, {"path": "a.png"}, {"bytes": "text"}])
def test_a_table_of_other_images_is_refused(tmp_path: Path, image: Any) -> None:
    write_table(tmp_path, [image, image], prompt=["a", "b"])
    with pytest.raises(ValueError, match=r"reference.parquet: column image is .*, not bytes or a struct with bytes"):
        read_real_images(tmp_path)


def test_the_fingerprint_of_files_follows_their_content(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = read_real_images(tmp_path)
    assert isinstance(files, ImageFiles)
    before = files.fingerprint
    assert before == files.fingerprint
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    assert files.fingerprint != before
