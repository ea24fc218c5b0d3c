from __future__ import annotations

from pathlib import Path

import pytest

import pipeline.sample
from stages.errors import UsageError, UserError
from stages.evaluate import comparisons
from stages.evaluate.config import SampleConfig


def test_a_file_of_prompts_is_not_drawn_as_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("panda\n")
    config = SampleConfig(
        adapter_dir="unused", prompts=[str(tmp_path / "prompts.txt")], output=str(tmp_path / "grid.png")
    )
    with pytest.raises(UsageError, match=r"prompts=\[.*prompts.txt\]: is a file: give texts"):
        pipeline.sample.main(config)


def test_conditions_are_checked_before_the_pipeline_is_loaded(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "load_pipeline", None)
    options = {"adapter_dir": str(tiny_adapter), "output": str(tmp_path / "grid.png")}
    with pytest.raises(UserError, match=r"class_labels=\[10\]: name classes that the adapter was trained on: 0 to 9"):
        pipeline.sample.main(SampleConfig(**options, class_labels=[10]))
    with pytest.raises(UserError, match=r"size=\[64\]: give \[width,height\]"):
        pipeline.sample.main(SampleConfig(**options, size=[64]))
