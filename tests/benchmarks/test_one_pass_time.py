from __future__ import annotations

import json

import pytest

from tests.benchmarks.one_pass_time import main


def test_the_measurement_runs_at_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    main("tiny_sd15", "eager", "16", "0.1", "2")
    info = json.loads(capsys.readouterr().out)
    assert info["latent"] == [4, 16, 16]
    assert set(info["passes"]) == {"bare", "cfg", "fused", "unfused"}
    assert all(kind["ms"]["median"] > 0 for kind in info["passes"].values())
