from __future__ import annotations

import pytest

from stages.progress import progress


def test_away_from_a_terminal_it_writes_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "generate", "records", initial=4) as bar:
        bar.update(6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("generate: 10/10 records")
    assert not any("\r" in line for line in lines)
