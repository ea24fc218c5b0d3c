"""The teacher's share of a worker's time. Encoding and writing run beside it, so that the rest should be near zero.

python -m tests.benchmarks.teacher_share [trajectories: 2000] [workers: 1] [output_dir]

Runs the digits' teacher under real Ray, from its loading to the last commit. Prints one JSON object: the profile of
`generation.json` and the number of units. Fails if more than 3% is not the teacher's. Leave idle cores beside the
workers, because a worker writes while it samples.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.driver import Driver
from stages.generate.fleet import RayFleet

TEACHER = "stages/embedded/mnist_dit"
LEAST_SHARE = 0.97


def measure(trajectories: int, workers: int, output: str) -> dict[str, Any]:
    config = GenerateConfig(TeacherConfig(TEACHER), output, num_trajectories=trajectories, num_workers=workers)
    summary = Driver(config).run(RayFleet(config))
    return {"workers": workers, "units": summary["units_committed"]} | summary["profile"]


def main(trajectories: str = "2000", workers: str = "1", output: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        info = measure(int(trajectories), int(workers), output or f"{folder}/data")
    print(json.dumps(info, indent=2))
    if info["teacher_share"] < LEAST_SHARE:
        sys.exit(f"error: the teacher has {info['teacher_share']:.3f} of the time, not {LEAST_SHARE}")


if __name__ == "__main__":
    main(*sys.argv[1:])
