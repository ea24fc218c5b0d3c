from __future__ import annotations

import pytest

from stages.progress import progress


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "generate", "records", initial=4) as bar:
        bar.update(6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("generate: 10/10 records")
    assert not any("\r" in line for line in lines)
