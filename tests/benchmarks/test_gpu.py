"""The measurements for a GPU, at small size on a CPU without Ray and pyarrow, and their scripts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.training_memory import HELD

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IN_ONE_PROCESS = """
import sys, json
sys.modules["pyarrow"] = sys.modules["ray"] = None
from tests.benchmarks.gpu import parts
one_compiled = [part for part in parts(tiny=True) if not part.name.startswith("compiled") or "dit" in part.name]
rows = {part.name: list(part.work(*part.arguments)) for part in one_compiled}
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """The rows rows_of every part, from one process, because each would import torch and diffusers.

    Of the parts that compile, only one runs.
    """
    command = [sys.executable, "-W", "ignore", "-c", IN_ONE_PROCESS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(results: dict[str, list[dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    return [row for name, rows in results.items() if name.split()[0] == kind for row in rows]


@pytest.mark.long
def test_passes_are_compared_with_the_bare_one_and_with_cfg(results: dict[str, list[dict[str, Any]]]) -> None:
    rows = rows_of(results, "one_pass_time")
    assert [(row["shape"], row["batch"]) for row in rows] == [
        (shape, n) for shape in ("tiny SDXL", "tiny DiT", "tiny SD 1.5", "tiny SD 3.5") for n in (1, 8)
    ]
    for row in rows:
        baselines = {"offset", "cross_attention", "embedding"} if row["batch"] == 1 else set()
        assert set(row["passes"]) == {"bare", "cfg", "fused", "unfused"} | baselines
        assert row["passes"]["fused"].keys() == {"ms", "over_bare", "over_cfg"}
        assert row["rounds"] >= 3
        assert row["fuse_ms"]["from"] > 0
        assert row["adapter_share"] > 0


@pytest.mark.long
def test_another_scale_does_not_recompile(results: dict[str, list[dict[str, Any]]]) -> None:
    rows = rows_of(results, "compiled")
    assert [row["batch"] for row in rows] == [1, 8]
    for row in rows:
        assert row["graphs"] >= 1
        assert row["recompiled"] == 0
        assert row["passes"]["fused"]["over_eager"]["median"] > 0


@pytest.mark.long
def test_memory_training_and_recording_are_measured(results: dict[str, list[dict[str, Any]]]) -> None:
    rows = rows_of(results, "training_memory")
    assert [row["held"] for row in rows] == [*HELD, "none", "nf4"]
    assert all(("quantization=" in row.get("error", "")) == ("peak" not in row) for row in rows)
    assert all(row["peak"] > 0 for row in rows if row["held"] in ("none", "offload"))
    for row in rows_of(results, "training"):
        assert row["step_over_floor"]["median"] > 0
        assert row["records_per_second"]["from"] <= row["records_per_second"]["to"]
    assert [row["batch_size"] for row in rows_of(results, "recording")] == [2, 4]
    assert all(row["recorded_over_bare"]["median"] > 0 for row in rows_of(results, "recording"))
    assert rows_of(results, "metadata")[0]["versions"]["torch"]


@pytest.mark.parametrize("name", ["gpu.sh", "gpu_wheels.sh"])
def test_the_scripts_are_sound(name: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), HERE / name], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_wheels_are_pinned_and_stay_out_of_the_repository_and_the_images() -> None:
    packages = re.search(r"packages=\(([^)]*)\)", (HERE / "gpu_wheels.sh").read_text())
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert packages is not None
    assert set(packages[1].split()) <= pinned
    for file in (".gitignore", ".dockerignore"):
        assert "tests/benchmarks/wheels" in (ROOT / file).read_text()
