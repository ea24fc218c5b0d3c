from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.base.loading import choose_device, load_pipeline, located, resolve
from stages.errors import UserError


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


def test_auto_is_a_gpu_if_there_is_one() -> None:
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match="device=abacus: this device is not available: use device=auto"):
        choose_device("abacus")
