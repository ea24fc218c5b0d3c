from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.schema import TensorSpec
from stages.train.decoding import Decoder, load_vae
from stages.train.sampling import Samples

SIDE, ENLARGED = 32, 2


@pytest.fixture
def decoder(dataset: Dataset, tiny_teacher: Path) -> Decoder:
    return Decoder(str(tiny_teacher), dataset, "cpu")


def test_each_trajectory_has_a_column_and_each_way_to_sample_a_row(decoder: Decoder) -> None:
    torch.manual_seed(0)
    latents = [torch.randn(4, 8, 8) for _ in range(4)]
    picture = decoder.draw(Samples(latents[:2], latents[2:], latents[:2], {}))
    side = SIDE * ENLARGED
    assert picture.size == (2 * side, 3 * side)
    rows = [picture.crop((0, i * side, picture.width, (i + 1) * side)).tobytes() for i in range(3)]
    assert rows[0] == rows[2] != rows[1]


def test_latents_of_several_sizes_share_a_picture(decoder: Decoder) -> None:
    latents = [torch.randn(4, 8, 8), torch.randn(4, 4, 16)]
    picture = decoder.draw(Samples(latents, latents, latents, {}))
    assert picture.size == (2 * 64, 3 * 32)


def test_a_vae_loads_from_its_own_folder(decoder: Decoder, tmp_path: Path) -> None:
    decoder.vae.save_pretrained(tmp_path)
    assert type(load_vae(str(tmp_path), 4)) is AutoencoderKL


def test_a_path_without_a_vae_is_named(dataset: Dataset, tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vae_name_or_path=.*missing: no VAE could be loaded from it"):
        load_vae(str(tmp_path / "missing"), 4)
    for path, channels, message in (
        (tiny_teacher, 16, "AutoencoderKL"),
        (tiny_teacher / "transformer", 4, "DiTTransformer2DModel"),
    ):
        with pytest.raises(UserError, match=f"{message} is not a VAE for latents of {channels} channels"):
            load_vae(str(path), channels)
    dataset.info.tensors["latent"] = TensorSpec("float16", [64, 16])
    with pytest.raises(UserError, match=r"latents \[64, 16\] are not those of images"):
        Decoder(str(tmp_path), dataset, "cpu")


def test_a_vae_that_does_not_decode_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise RuntimeError("of other sizes\nthan these")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    message = f"vae_name_or_path={decoder.name_or_path}: cannot decode the recorded latents: RuntimeError: of other sizes: leave"
    with pytest.raises(UserError, match=message):
        decoder.try_out(torch.zeros(4, 8, 8))
