from __future__ import annotations

import json

import pytest

from tests.benchmarks.one_pass_time import MEASURED, main


def test_the_measurement_runs_at_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    main("tiny", "8", "1")
    told = json.loads(capsys.readouterr().out)
    assert [(row["variant"], row["schedule_cache"]) for row in told["rows"]] == MEASURED
    assert all(row["time"] > 0 for row in told["rows"])
    assert all(("table_in_steps" in row) == row["schedule_cache"] for row in told["rows"])
