from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from stages.base.size import DEFAULT_SIZE
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.decoding import Decoder, load_vae
from stages.train.sampling import Samples

SIDE, ENLARGED = 32, 2


@pytest.fixture
def decoder(dataset: Dataset, tiny_teacher: Path) -> Decoder:
    return Decoder(str(tiny_teacher), dataset, "cpu")


def test_each_trajectory_has_a_column_and_each_way_to_sample_a_row(decoder: Decoder) -> None:
    torch.manual_seed(0)
    latents = [torch.randn(4, 8, 8) for _ in range(4)]
    picture = decoder.draw(Samples([DEFAULT_SIZE] * 2, latents[:2], latents[2:], latents[:2], {}))
    side = SIDE * ENLARGED
    assert picture.size == (2 * side, 3 * side)
    rows = [picture.crop((0, i * side, picture.width, (i + 1) * side)).tobytes() for i in range(3)]
    assert rows[0] == rows[2] != rows[1]


def test_latents_of_several_sizes_share_a_picture(decoder: Decoder) -> None:
    decoder.shapes = {"64x64": [4, 8, 8], "32x128": [4, 4, 16]}
    latents = [torch.randn(4, 8, 8), torch.randn(4, 4, 16)]
    picture = decoder.draw(Samples(list(decoder.shapes), latents, latents, latents, {}))
    assert picture.size == (2 * 64, 3 * 32)


def test_a_vae_loads_from_its_own_folder(decoder: Decoder, tmp_path: Path) -> None:
    decoder.vae.save_pretrained(tmp_path)
    assert type(load_vae(str(tmp_path))) is AutoencoderKL


def test_a_path_without_a_vae_is_named(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vae_name_or_path=.*missing: no VAE could be loaded from it"):
        load_vae(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="DiTTransformer2DModel is no VAE"):
        load_vae(str(tiny_teacher / "transformer"))


def test_a_vae_that_does_not_decode_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise RuntimeError("of other sizes\nthan these")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    message = f"vae_name_or_path={decoder.name_or_path}: cannot decode the recorded latents: RuntimeError: of other sizes: leave"
    with pytest.raises(UserError, match=message):
        decoder.try_out(DEFAULT_SIZE, torch.zeros(4, 8, 8))
