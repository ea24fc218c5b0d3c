from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import scale
from tests.benchmarks.scale import carried, efficiency, missed, resumed

FLOOR = 0.5  # at units a tenth as long, on cores that others use too
BYTES_PER_UNIT = 2048


@pytest.mark.usefixtures("ray_cluster")
def test_workers_are_kept_at_work(tmp_path: Path) -> None:
    told = efficiency(tmp_path, workers=4, units_per_worker=10, seconds=0.2)
    assert told["units"] == 40
    assert FLOOR < told["efficiency"] <= 1


def test_memory_grows_little_with_the_units_and_resuming_comes_to_a_dispatch(tmp_path: Path) -> None:
    few, many = (carried(tmp_path / str(units), units)["bytes_at_the_peak"] for units in (11_000, 21_000))
    assert many - few < 10_000 * BYTES_PER_UNIT
    assert resumed(tmp_path / "resumed", 1000)["seconds_to_resume"] > 0


def test_a_goal_that_is_missed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "workers": [{"workers": 64, "efficiency": 0.96}, {"workers": 256, "efficiency": 0.5}],
        "memory": {"bytes_at_the_peak": 1 << 29},
        "resume": {"seconds_to_resume": 5.0},
    }
    assert missed(told) == []
    monkeypatch.setattr(scale, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(scale, "EFFICIENCY", 0.99)
    assert missed(told) == ["64 workers: an efficiency of 0.96", "time to resume"]
