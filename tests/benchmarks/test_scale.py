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

FLOOR = 0.5  # with units a tenth as long, on shared cores
AT_ONCE = 64  # commits in memory: with few, growth per commit shows early


def held(root: Path, units: int) -> int:
    """Return the peak bytes that Python and Arrow hold in a driver's run; resident memory differs between machines."""
    commits.COMMITS_AT_ONCE = manifest.ROWS_PER_BATCH = AT_ONCE
    config = sleeping_config(TEACHER, root, 0.0, units)
    tracemalloc.start()
    Driver(config).run(MadeUpFleet(root))
    return tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory()


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_workers_stay_busy(tmp_path: Path) -> None:
    info = efficiency(tmp_path, workers=4, units_per_worker=10, seconds=0.2)
    assert info["units"] == 40
    assert FLOOR < info["efficiency"] <= 1


@pytest.mark.long
def test_the_drivers_memory_per_unit_allows_a_million_units(tmp_path: Path) -> None:
    peaks = [fresh(held, tmp_path / str(units), units) for units in (1000, 2000, 3000)]
    grown = min(
        more - fewer for fewer, more in pairwise(peaks)
    )  # the minimum leaves out a doubling of the interpreter's tables
    assert 0 < grown < 1000 * MOST_BYTES / 1_000_000


@pytest.mark.long
def test_memory_and_the_time_to_resume_are_measured(tmp_path: Path) -> None:
    assert carried(tmp_path / "carried", 1000)["bytes_at_the_peak"] > 0
    assert resumed(tmp_path / "resumed", 1000)["seconds_to_resume"] > 0


def test_a_missed_goal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "workers": [{"workers": 64, "efficiency": 0.96}, {"workers": 256, "efficiency": 0.5}],
        "memory": {"bytes_at_the_peak": 1 << 29},
        "resume": {"seconds_to_resume": 5.0},
    }
    assert missed(info) == []
    monkeypatch.setattr(scale, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(scale, "EFFICIENCY", 0.99)
    assert missed(info) == ["64 workers: an efficiency of 0.96", "time to resume"]
