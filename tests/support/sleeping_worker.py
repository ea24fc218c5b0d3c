"""A worker that sleeps where a teacher would sample, and loads so little that hundreds fit on one machine."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import ray

from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.planned import Unit
from stages.storage.files import create
from stages.storage.sealing import seal

# The facts of a made-up teacher, as JSON: to build them as a dataclass takes torch.
FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("teacher_facts.json").read_text())


def sleeping_config(teacher: Path, output: Path, seconds: float, units: int, workers: int = 1) -> GenerateConfig:
    """Units of one trajectory of one record."""
    return GenerateConfig(
        TeacherConfig(str(teacher), variant=f"{seconds:g}"),
        str(output),
        num_trajectories=units,
        trajectories_per_unit=1,
        num_inference_steps=1,
        num_workers=workers,
    )


def made_up_commit(unit: int, plan: str | None) -> dict[str, Any]:
    """A commit record of one sample, as `commit_unit` would leave it."""
    sample = {
        "key": f"{unit:09d}_0000", "offset": 1536, "size": 16384, "checksum": unit, "trajectory": unit, "records": 1,
        "scale": 1.0 + unit % 5, "timestep_min": 1.0, "timestep_max": 999.0, "class_label": unit % 10, "prompt": None,
        "seed": unit, "denoiser": "transformer",
    }  # fmt: skip
    sha256 = hashlib.sha256(str(unit).encode()).hexdigest()
    shard = f"shards/{unit:05d}-{sha256[:8]}.tar"
    return {
        "unit": unit, "plan": plan, "shard": shard, "size": 20480, "sha256": sha256, "tensors": {}, "samples": [sample],
    }  # fmt: skip


class SleepingWorker:
    """A worker without shards. Its commits are real: written and synced like any other."""

    def __init__(self, config: GenerateConfig) -> None:
        self.seconds, self.root = float(str(config.teacher.variant)), Path(config.output_dir)
        self.plans: dict[int, str | None] = {}

    def place(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def load(self, example: dict[str, Any]) -> dict[str, Any]:
        return FACTS

    def sample(self, unit: Unit) -> None:
        self.plans[unit.index] = unit.plan
        time.sleep(self.seconds)

    def commit(self, index: int) -> tuple[int, dict[str, float]]:
        create(self.root / f"commits/{index:05d}.json", seal(made_up_commit(index, self.plans.pop(index))))
        return 1, {"teacher": self.seconds}


class NeverStarts(SleepingWorker):
    def __init__(self, config: GenerateConfig) -> None:
        raise ImportError("no such library")
