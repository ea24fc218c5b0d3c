from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import StorageError, UserError
from stages.storage.locks import exclusive_lock


def test_one_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "run", "another run is training"):
        with (
            pytest.raises(
                UserError, match="run: another run is training here: wait for it, or take another output_dir"
            ),
            exclusive_lock(tmp_path / "run", "another run is training"),
        ):
            pass
        with exclusive_lock(tmp_path / "other", "another run is training"):
            pass
    with exclusive_lock(tmp_path / "run", "another run is training"):
        pass


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(StorageError, match=f"{tmp_path}: cannot be written: Is a directory"),
        exclusive_lock(tmp_path, "another run is training"),
    ):
        pass
