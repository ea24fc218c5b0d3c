"""A worker that sleeps in place of sampling, and loads so little that hundreds fit on one machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from stages.errors import UserError
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.unit import Unit
from stages.storage.files import create
from stages.storage.sealing import seal

# The facts of a made-up teacher, as JSON, because the dataclass would import torch.
FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("teacher_facts.json").read_text())


def sleeping_config(teacher: Path, output: Path, seconds: float, units: int, workers: int = 1) -> GenerateConfig:
    """Return a configuration whose units hold one trajectory of one record."""
    return GenerateConfig(
        TeacherConfig(str(teacher), variant=f"{seconds:g}"),
        str(output),
        num_trajectories=units,
        trajectories_per_unit=1,
        num_inference_steps=1,
        num_workers=workers,
    )


def made_up_commit(unit: int, plan: str | None) -> dict[str, Any]:
    """Make up a commit record of one sample, as `commit_unit` writes it."""
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
    """A worker without shards, whose commits are real: written and synced like any other."""

    def __init__(self, config: GenerateConfig) -> None:
        self.seconds, self.root = float(str(config.teacher.variant)), Path(config.output_dir)
        self.plans: dict[int, str | None] = {}

    def place(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def load(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


class Refuses(SleepingWorker):
    """Fails to load with an error that names the teacher, like a real worker whose teacher is missing."""

    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config)
        self.teacher = config.teacher.pretrained_model_name_or_path

    def load(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise UserError(f"{self.teacher}: there is no such folder")


class KilledOnce(SleepingWorker):
    """Sends itself SIGKILL in the first unit that any worker samples."""

    def sample(self, unit: Unit) -> None:
        super().sample(unit)
        with suppress(FileExistsError):
            (self.root.parent / "killed").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)


class Placed(SleepingWorker):
    """A worker that reports its Ray node and its resources."""

    def load(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
            "kept": ray.get_runtime_context().get_assigned_resources(),
            "word": os.environ["A_WORD"],
        }
