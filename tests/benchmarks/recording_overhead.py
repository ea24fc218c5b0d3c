"""The cost of recording: a recorded unit over the bare guided pipeline on the same batch, interleaved.

python -m tests.benchmarks.recording_overhead [folder or hub id of a class-conditional pipeline] [batch size] [device]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from stages.base.sampling import Request, sample, undecoded
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.plan import Plan
from stages.generate.scale import GUIDES
from stages.generate.teacher import Teacher

ROUNDS, STEPS = 15, 20


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(name_or_path: str = "stages/embedded/mnist_dit", batch_size: str = "50", device: str = "auto") -> None:
    size = int(batch_size)
    config = GenerateConfig(
        TeacherConfig(name_or_path), "unused", num_inference_steps=STEPS, trajectories_per_unit=size, batch_size=size,
        num_trajectories=size, device=device,
    )  # fmt: skip
    plan = Plan(config)
    teacher, unit = Teacher(config, plan.examples), plan.unit(0)
    request = Request([t.condition for t in unit.trajectories], [t.seed for t in unit.trajectories], STEPS, {})

    def bare() -> None:
        with undecoded(teacher.pipe):
            sample(teacher.pipe, request, GUIDES)

    bare()
    ratios = [timed(lambda: teacher.run(unit)) / timed(bare) for _ in range(ROUNDS)]
    name = torch.cuda.get_device_name() if teacher.device.startswith("cuda") else "cpu"
    print(
        f"{name_or_path}, {size} trajectories of {STEPS} steps on {name}: recorded over bare, median of {ROUNDS} pairs:"
    )
    print(f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
