from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from stages.base.pictures import PicturePath, check_pictures, grid, open_picture, to_picture
from stages.errors import UserError
from tests.support.faulty_s3 import FaultyS3


def test_a_picture_shows_its_tensor() -> None:
    image = torch.stack([torch.ones(4, 6), torch.zeros(4, 6), -torch.ones(4, 6)])
    picture = to_picture(image)
    assert picture.size == (6, 4)
    assert picture.getpixel((2, 2)) == (255, 128, 0)
    assert to_picture(torch.ones(1, 4, 4)).mode == "L"


def test_a_grid_has_its_rows_and_enlarges_small_pictures() -> None:
    white, black = to_picture(torch.ones(1, 8, 8)), to_picture(-torch.ones(1, 8, 8))
    sheet = grid([[white] * 3, [black] * 2])
    assert sheet.size == (48, 32)
    assert sheet.getpixel((5, 5)) == (255, 255, 255)
    assert sheet.getpixel((5, 30)) == (0, 0, 0)
    assert grid([[to_picture(torch.zeros(3, 64, 64))]]).size == (64, 64)


def moving(path: Path, frames: int = 3) -> Path:
    pictures = [Image.new("RGB", (8, 8), (80 * i, 0, 0)) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return path


def test_a_path_is_beside_the_prompts_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts/shown").mkdir(parents=True)
    for name in ("prompts/shown/a.png", "a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(tmp_path / "prompts")
    beside = PicturePath("shown/a.png", folder)
    assert beside == "shown/a.png"
    assert json.dumps({"image": beside}) == '{"image": "shown/a.png"}'
    assert beside.place == str(tmp_path / "prompts/shown/a.png")
    assert PicturePath("b.png", folder).place == "b.png"
    assert PicturePath("~/b.png", folder).place == f"{tmp_path}/b.png"
    assert PicturePath(str(tmp_path / "b.png"), "s3://bucket/coco").place == f"{tmp_path}/b.png"
    assert PicturePath("a.png", "s3://bucket/coco").place == "s3://bucket/coco/a.png"
    assert PicturePath("s3://other/a.png", folder).place == "s3://other/a.png"
    assert copy.deepcopy(beside).place == pickle.loads(pickle.dumps(beside)).place == beside.place


def test_a_picture_is_upright_and_in_colour(tmp_path: Path) -> None:
    turned = Image.new("L", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    picture = open_picture("image", str(tmp_path / "turned.jpg"))
    assert (picture.size, picture.mode) == ((4, 8), "RGB")
    frames = open_picture("video", str(moving(tmp_path / "moving.gif")))
    assert [frame.size for frame in frames] == [(8, 8)] * 3


def test_every_picture_is_checked_before_any_is_used(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "wide.png")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    moving(tmp_path / "short.gif", 2)
    moving(tmp_path / "long.gif", 3)

    def check(*names: str, name: str = "image", of_one_size: bool = True) -> None:
        check_pictures([{name: PicturePath(n, str(tmp_path))} for n in names], "prompts=p.csv", of_one_size)

    check("a.png", "a.png")
    check("a.png", "wide.png", of_one_size=False)
    for names, message in [
        (("a.png", "wide.png"), "row 2: image=wide.png: is 8x4, the first is 8x8: give pictures of one size"),
        (("a.png", "gone.png"), r"row 2: image=gone\.png: .*gone\.png is not readable as a picture: No such file"),
        (("text.png",), r"row 1: image=text\.png: .* is not readable as a picture: cannot identify"),
        (("a.png", "cut.jpg"), "row 2: image=cut.jpg: .*truncated"),
        ((str(tmp_path),), "row 1: image=.*Is a directory"),
    ]:
        with pytest.raises(UserError, match=f"^prompts=p.csv: {message}") as error:
            check(*names, of_one_size=True)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="row 2: video=long.gif: is 3 frames of 8x8, the first is 2 frames of 8x8"):
        check("short.gif", "long.gif", name="video")


def test_a_picture_is_read_from_a_bucket(s3: FaultyS3, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    s3.put("coco/a.png", (tmp_path / "a.png").read_bytes())
    assert open_picture("image", PicturePath("a.png", "s3://bucket/coco")).size == (8, 8)
    with pytest.raises(UserError, match=r"image=b\.png: s3://bucket/coco/b\.png is not readable as a picture"):
        open_picture("image", PicturePath("b.png", "s3://bucket/coco"))
