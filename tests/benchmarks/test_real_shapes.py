from __future__ import annotations

import json

import pytest

from tests.benchmarks.real_shapes import main


def test_the_measurement_runs_at_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    main("tiny", "2", "2")
    told = json.loads(capsys.readouterr().out)
    assert told["recorded_over_bare"] > 0
    assert told["records_per_second"] > 0
    assert told["training_step_over_floor"] > 0
