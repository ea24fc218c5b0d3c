from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from stages.generate.driver import Driver
from stages.records import commits, manifest
from tests.benchmarks import scale
from tests.benchmarks.scale import (
    MOST_BYTES,
    TEACHER,
    MadeUpFleet,
    carried,
    efficiency,
    fresh,
    missed,
    resumed,
)
from tests.support.sleeping_worker import sleeping_config

FLOOR = 0.5  # at units a tenth as long, on cores that others use too
AT_ONCE = 64  # commits in memory, so that it shows soon what is kept of each


def held(root: Path, units: int) -> int:
    """Bytes that Python and Arrow hold at most in a driver's run: what is resident beside differs between machines."""
    commits.COMMITS_AT_ONCE = manifest.ROWS_PER_BATCH = AT_ONCE
    config = sleeping_config(TEACHER, root, 0.0, units)
    tracemalloc.start()
    Driver(config).run(MadeUpFleet(root))
    return tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory()


@pytest.mark.usefixtures("ray_cluster")
def test_workers_are_kept_at_work(tmp_path: Path) -> None:
    info = efficiency(tmp_path, workers=4, units_per_worker=10, seconds=0.2)
    assert info["units"] == 40
    assert FLOOR < info["efficiency"] <= 1


def test_a_unit_takes_no_more_of_the_drivers_memory_than_a_million_may(tmp_path: Path) -> None:
    peaks = [fresh(held, tmp_path / str(units), units) for units in (1000, 2000, 3000)]
    grown = min(more - fewer for fewer, more in pairwise(peaks))  # where no table of the interpreter's own doubles
    assert 0 < grown < 1000 * MOST_BYTES / 1_000_000


def test_memory_and_the_time_to_resume_are_measured(tmp_path: Path) -> None:
    assert carried(tmp_path / "carried", 1000)["bytes_at_the_peak"] > 0
    assert resumed(tmp_path / "resumed", 1000)["seconds_to_resume"] > 0


def test_a_goal_that_is_missed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "workers": [{"workers": 64, "efficiency": 0.96}, {"workers": 256, "efficiency": 0.5}],
        "memory": {"bytes_at_the_peak": 1 << 29},
        "resume": {"seconds_to_resume": 5.0},
    }
    assert missed(info) == []
    monkeypatch.setattr(scale, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(scale, "EFFICIENCY", 0.99)
    assert missed(info) == ["64 workers: an efficiency of 0.96", "time to resume"]
