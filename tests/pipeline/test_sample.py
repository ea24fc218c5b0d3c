from __future__ import annotations

from pathlib import Path

import pytest

import pipeline.sample
from stages.errors import UsageError
from stages.evaluate.config import SampleConfig


def test_a_file_of_prompts_is_not_drawn_as_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("panda\n")
    config = SampleConfig(
        adapter_dir="unused", prompts=[str(tmp_path / "prompts.txt")], output=str(tmp_path / "grid.png")
    )
    with pytest.raises(UsageError, match=r"prompts=\[.*prompts.txt\]: is a file: give texts"):
        pipeline.sample.main(config)
