"""A worker that sleeps where a teacher would sample, and loads so little that hundreds fit on one machine."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from stages.generate.config import GenerateConfig, TeacherConfig
from stages.records.plans import plan_digests, read_info
from stages.records.schema import Commit
from stages.storage.files import create
from stages.storage.folder import open_folder
from stages.storage.sealing import seal
from tests.support.made_up import teacher_facts

FACTS: dict[str, Any] = json.loads(json.dumps(asdict(teacher_facts(guidance_rule={"name": "none: it sleeps"}))))


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


def made_up_commit(unit: int, plan: str) -> Commit:
    """A commit record of one sample, as `commit_unit` would leave it."""
    sample = {
        "key": f"{unit:09d}_0000", "offset": 1536, "size": 16384, "checksum": unit, "trajectory": unit, "records": 1,
        "scale": 1.0 + unit % 5, "timestep_min": 1.0, "timestep_max": 999.0, "class_label": unit % 10, "prompt": None,
        "seed": unit, "denoiser": "transformer",
    }  # fmt: skip
    sha256 = hashlib.sha256(str(unit).encode()).hexdigest()
    shard = f"shards/{unit:05d}-{sha256[:8]}.tar"
    return Commit(unit, plan, shard, 20480, sha256, {}, [sample])


def digest_of_plan(root: Path, unit: int) -> str:
    """Return the digest of a unit's plan, from `dataset.json`."""
    info = read_info(open_folder(root))
    assert info is not None
    return next(digest for end, digest in plan_digests(info) if unit < end)


class SleepingWorker:
    """A worker without shards. Its commits are real: written and synced like any other."""

    def __init__(self, config: GenerateConfig) -> None:
        self.seconds, self.root = float(str(config.teacher.variant)), Path(config.output_dir)

    def place(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def load(self) -> dict[str, Any]:
        return FACTS

    def sample(self, index: int) -> None:
        time.sleep(self.seconds)

    def commit(self, index: int) -> tuple[int, dict[str, float]]:
        commit = made_up_commit(index, digest_of_plan(self.root, index))
        create(self.root / f"commits/{index:05d}.json", seal(asdict(commit)))
        return 1, {"teacher": self.seconds}


class NeverStarts(SleepingWorker):
    def __init__(self, config: GenerateConfig) -> None:
        raise ImportError("no such library")
