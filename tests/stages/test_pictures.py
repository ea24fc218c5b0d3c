from __future__ import annotations

import torch

from stages.pictures import grid, to_picture


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
