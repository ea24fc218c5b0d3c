from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.base.loading import absent_components, choose_device, load_pipeline, located, resolve
from stages.errors import UserError
from tests.support.families import stable_diffusion_3


def test_models_are_found_in_the_working_directory_the_project_or_on_a_hub(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(str(tiny_teacher)) == str(tiny_teacher)
    assert Path(resolve("stages/embedded")).is_dir()
    assert resolve("someone/some-model") == "someone/some-model"


def test_a_local_model_has_an_absolute_path_for_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert located("prompts.txt") == str(tmp_path / "prompts.txt")
    assert located("s3://bucket/prompts.txt") == "s3://bucket/prompts.txt"
    assert located("somebody/something") == "somebody/something"


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no DiffusionPipeline could be loaded"):
        load_pipeline(str(tmp_path))


def test_components_that_a_pipeline_was_saved_without_are_none(tmp_path: Path) -> None:
    """`from_pretrained` refuses this one, saved without T5, unless it is told so."""
    pipe = stable_diffusion_3()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    assert {"text_encoder_3", "tokenizer_3"} <= set(absent_components(str(tmp_path)))
    loaded: Any = load_pipeline(str(tmp_path))
    assert loaded.text_encoder_3 is None
    assert loaded.text_encoder.dtype == loaded.transformer.dtype == torch.float32


def test_auto_is_a_gpu_if_there_is_one() -> None:
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match="device=abacus: this device is not available: use device=auto"):
        choose_device("abacus")
