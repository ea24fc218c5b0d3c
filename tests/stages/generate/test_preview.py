from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from stages.generate.preview import write_preview, write_preview_grid
from stages.storage.folder import open_folder
from tests.conftest import generate, generate_config


def test_previews_form_one_picture_in_their_order(tmp_path: Path) -> None:
    for index in (9, 0, 5):
        write_preview(open_folder(tmp_path), index, torch.full((1, 64, 64), index / 5 - 1))
    write_preview_grid(open_folder(tmp_path))
    with Image.open(tmp_path / "preview.png") as sheet:
        assert sheet.size == (192, 64)
        assert [sheet.getpixel((64 * i + 9, 9))[0] for i in range(3)] == [0, 128, 230]  # type: ignore[index]


def test_nothing_is_decoded_without_a_preview(tiny_teacher: Path, tmp_path: Path) -> None:
    assert not (generate(generate_config(tiny_teacher, tmp_path / "none")) / "preview.png").exists()
    shown = generate(generate_config(tiny_teacher, tmp_path / "some", preview=4))
    assert len(list((shown / "preview").iterdir())) == 4
    with Image.open(shown / "preview.png") as sheet:
        assert sheet.size == (4 * 32 * 2, 32 * 2)
    (shown / "preview" / "00001.png").write_bytes(b"")
    write_preview_grid(open_folder(shown))
    with Image.open(shown / "preview.png") as sheet:
        assert sheet.size == (3 * 32 * 2, 32 * 2)
    whole = (shown / "preview" / "00002.png").read_bytes()
    (shown / "preview" / "00002.png").write_bytes(whole[: len(whole) // 2])
    write_preview_grid(open_folder(shown))
    with Image.open(shown / "preview.png") as sheet:
        assert sheet.size == (2 * 32 * 2, 32 * 2)
