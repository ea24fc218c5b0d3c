from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.several_sizes import TRAINED, Budget, rows

THIRD = [64, 48]


@pytest.mark.long
def test_an_adapter_of_two_sizes_serves_a_third_like_one_of_one(tmp_path: Path) -> None:
    """With as many trajectories and steps, few here, both close a good part of the gap."""
    one, two = rows(tmp_path, Budget(trajectories=40, steps=40, samples=8, seeds=1), [THIRD])
    assert [one["trained"], two["trained"]] == list(TRAINED.values())
    assert one["size"] == two["size"] == THIRD
    (one_closed,), (two_closed,) = one["gap_closed"], two["gap_closed"]
    assert one_closed > 0.2
    assert two_closed > 0.85 * one_closed
