from __future__ import annotations

import json

import pytest

from tests.benchmarks import real_shapes
from tests.benchmarks.real_shapes import main


def test_the_measurement_runs_at_small_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_shapes, "SECONDS", 0.1)
    main("tiny_sdxl", "2", "2")
    info = json.loads(capsys.readouterr().out)
    assert info["recording"]["recorded_over_bare"]["median"] > 0
    assert info["recording"]["records_per_second"]["median"] > 0
    assert info["training"]["step_over_floor"]["median"] > 0
    assert info["training"]["operations_over_floor"] > 1
