"""Where the commands are started: what is missing there is told in a line, before libraries fail at it in ways of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

PLACES = {
    "a folder that is gone": (
        'cd "$0/gone"; rmdir "$0/gone"',
        "the folder that this was started in: No such file or directory: cd to one that is there",
    ),
    "a folder of compiled code that cannot be": (
        'touch "$0/file"; export TORCHINDUCTOR_CACHE_DIR="$0/file/cache"',
        "TORCHINDUCTOR_CACHE_DIR={}/file/cache: Not a directory: unset it, or name another folder",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_where_torch_cannot_be_imported_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script, info = PLACES[place]
    command = f'{script}; exec "{sys.executable}" -m pipeline.verify data_dir=/data'
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    overrides = ["bash", "-c", command, str(tmp_path)]
    ended = subprocess.run(overrides, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, f"error: {info.format(tmp_path)}\n")


def test_a_machine_without_any_place_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.tempfile, "tempdir", None)
    monkeypatch.setattr(pipeline.tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(SystemExit, match="no folder for temporary files can be written to: name one with TMPDIR"):
        pipeline.check_surroundings()
