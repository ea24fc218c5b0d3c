from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.schema import TensorSpec
from stages.train.base import load_base
from stages.train.decoding import COLUMNS, Decoder, load_vae
from stages.train.selection import SelectedSample
from stages.train.student import Student
from tests.conftest import small_adapter
from tests.support.made_up import teacher_facts


@pytest.fixture
def decoder(dataset: Dataset, tiny_teacher: Path) -> Decoder:
    return Decoder(str(tiny_teacher), dataset, [*map(SelectedSample, dataset.manifest.to_pylist())], "cpu")


def test_each_record_has_a_column_and_they_get_less_noisy(decoder: Decoder, dataset: Dataset) -> None:
    assert len(decoder.batch) == COLUMNS
    timesteps = decoder.batch.timestep.tolist()
    assert timesteps[0] > 700
    assert timesteps[-1] < 300
    student = Student.create(dataset, small_adapter(), load_base(dataset))
    picture = decoder.draw(student)
    side, enlarged = 32, 2
    assert picture.size == (COLUMNS * side * enlarged, 3 * side * enlarged)
    rows = [picture.crop((0, i * 64, picture.width, (i + 1) * 64)).tobytes() for i in range(3)]
    assert rows[0] == rows[2], "untrained, one pass differs from no guidance"
    assert rows[0] != rows[1]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", None])
def test_the_true_prediction_points_to_the_clean_latent(decoder: Decoder, kind: str | None) -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(COLUMNS, 4, 8, 8), torch.randn(COLUMNS, 4, 8, 8)
    steps = torch.arange(COLUMNS) * 100 + 100
    if kind is None:
        share = (steps / 1000).view(-1, 1, 1, 1)
        latent, prediction = (1 - share) * clean + share * noise, noise - clean
        decoder.noise = torch.arange(1000) / 1000
    else:
        alpha = DDIMScheduler().alphas_cumprod[steps].view(-1, 1, 1, 1)
        latent = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        prediction = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
    decoder.teacher = teacher_facts(prediction_type=kind, scheduler_config={})
    decoder.batch = replace(decoder.batch, latent=latent, timestep=steps)
    torch.testing.assert_close(decoder.denoised(prediction), clean, atol=1e-4, rtol=1e-4)


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
        Decoder(str(tmp_path), dataset, [], "cpu")


def test_a_vae_that_does_not_decode_the_records_is_refused_at_the_start(
    dataset: Dataset, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> None:
        raise RuntimeError("of other sizes\nthan these")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    message = f"vae_name_or_path={tiny_teacher}: cannot decode the recorded latents: RuntimeError: of other sizes: leave it out"
    with pytest.raises(UserError, match=message):
        Decoder(str(tiny_teacher), dataset, [*map(SelectedSample, dataset.manifest.to_pylist())], "cpu")
