from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.train.vae_folder import check_vae


def test_the_folder_of_a_vae_and_that_of_its_pipeline_are_taken(tiny_teacher: Path) -> None:
    check_vae(str(tiny_teacher))
    check_vae(str(tiny_teacher / "vae"))
    check_vae("owner/on-the-hub")


def test_what_a_folder_lacks_is_named(tiny_teacher: Path, tmp_path: Path) -> None:
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
            check_vae(str(path))
