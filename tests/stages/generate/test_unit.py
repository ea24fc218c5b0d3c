from __future__ import annotations

from pathlib import Path

from stages.generate.unit import UnitWorker
from stages.records.dataset import read_commits
from stages.records.folder import open_folder
from tests.conftest import generate_config


def test_a_worker_loads_once_and_commits_unit_by_unit(tiny_teacher: Path, tmp_path: Path) -> None:
    worker = UnitWorker(generate_config(tiny_teacher, tmp_path, records_per_sample=3))
    assert worker.load()["denoiser_class"] == "DiTTransformer2DModel"
    assert worker.make(2) == 12
    (commit,) = read_commits(open_folder(tmp_path)).values()
    assert commit["unit"] == 2
    assert [row["records"] for row in commit["samples"]] == [3, 1] * 3
    assert [row["key"] for row in commit["samples"]][:2] == ["000000006_0000", "000000006_0001"]
