from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from tests.conftest import generate
from tests.support.faults_table import survived
from tests.support.soak import BOTH, WORKER, check, soak, soak_config


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_kills_at_random_moments_lose_nothing(tiny_teacher: Path, tmp_path: Path) -> None:
    config = soak_config(tiny_teacher, tmp_path)
    config.ray_address = ray.get_runtime_context().gcs_address
    info = soak(config, tmp_path, seconds=20)
    check(tmp_path / "data", generate(replace(config, output_dir=str(tmp_path / "undisturbed"))))
    assert sum(info["kills"].values()) > 0
    for what, times in info["kills"].items():
        for _ in range(times):
            survived(
                f"SIGKILL of {'worker and driver' if what == BOTH else f'a {what}'} at a random moment",
                "worker" if what == WORKER else "driver",
            )
