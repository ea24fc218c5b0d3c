from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import teacher_share


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_the_measurement_runs_at_small_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_share, "LEAST_SHARE", 0.0)  # beside other tests
    teacher_share.main("100", output=str(tmp_path))
    info = json.loads(capsys.readouterr().out)
    assert info["units"] == 2
    assert 0 < info["teacher_share"] < 1
    assert info["teacher"] + info["recording"] + info["waiting"] == pytest.approx(
        info["teacher"] / info["teacher_share"]
    )
    monkeypatch.setattr(teacher_share, "LEAST_SHARE", 1.0)
    with pytest.raises(SystemExit, match="error: the teacher has .* of the time, not 1.0"):
        teacher_share.main("50", output=str(tmp_path / "again"))
