from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stages.base.size import DEFAULT_SIZE
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.vae_folder import check_vae


def test_the_folder_of_a_vae_and_that_of_its_pipeline_are_taken(dataset: Dataset, tiny_teacher: Path) -> None:
    check_vae(str(tiny_teacher), dataset)
    check_vae(str(tiny_teacher / "vae"), dataset)
    check_vae("owner/on-the-hub", dataset)


def test_a_dataset_that_does_not_tell_how_to_decode_is_refused(dataset: Dataset, tiny_teacher: Path) -> None:
    dataset.info.sizes[DEFAULT_SIZE] = replace(dataset.info.sizes[DEFAULT_SIZE], decoder_input=None)
    with pytest.raises(UserError, match=f"vae_name_or_path={tiny_teacher}: .* does not tell how to decode its latents"):
        check_vae(str(tiny_teacher), dataset)


def test_a_vae_for_other_latents_is_refused(dataset: Dataset, tiny_teacher: Path) -> None:
    dataset.info.sizes[DEFAULT_SIZE] = replace(dataset.info.sizes[DEFAULT_SIZE], decoder_input=[16, 8, 8])
    with pytest.raises(UserError, match="its latents have 4 channels, and those of the dataset 16"):
        check_vae(str(tiny_teacher), dataset)


def test_what_a_folder_lacks_is_named(dataset: Dataset, tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for path, message in (
        (tmp_path / "missing", "no such folder"),
        (tiny_teacher.parent, "no config.json in it, nor in a folder vae in it"),
        (tiny_teacher / "transformer", "DiTTransformer2DModel is no VAE"),
        (tmp_path, "its model is no VAE"),
        (tmp_path / "broken", "broken/config.json: Expecting property name"),
    ):
        with pytest.raises(UserError, match=f"vae_name_or_path=.*: no VAE could be loaded from it: .*{message}"):
            check_vae(str(path), dataset)
