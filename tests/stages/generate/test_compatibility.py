from __future__ import annotations

from pathlib import Path

import pytest

from stages.generate.compatibility import is_same_place


@pytest.mark.parametrize(
    ("described", "given", "same"),
    [
        ("base", "models/base", True),  # as published
        ("models/base", "../{here}/models/base", True),
        ("base", "models/other", False),
        ("models/base", "models/other", False),
        ("base", "someone/base", False),
        ("someone/base", "someone/base", True),
        (None, None, True),
        (None, "models/base", False),
    ],
)
def test_a_published_teacher_is_found_by_its_last_name(
    described: str | None, given: str | None, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_same_place(described, given and given.format(here=tmp_path.name)) == same
