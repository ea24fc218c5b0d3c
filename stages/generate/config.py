"""What generation can be told. The fields of `GenerateConfig` that define the dataset are all but `EXECUTION_KEYS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from stages.config import option

EXECUTION_KEYS = frozenset({"output_dir", "num_workers", "batch_size", "ray_address", "num_cpus", "num_gpus", "device"})
DTYPES = ("float32", "float16", "bfloat16")
MOST = 2**31 - 1


@dataclass
class TeacherConfig:
    pretrained_model_name_or_path: str = option(MISSING, "folder or hub id of a stock diffusers pipeline")
    torch_dtype: str = option("float32", "precision the teacher runs in", one_of=DTYPES)


@dataclass
class GenerateConfig:
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    output_dir: str = option(MISSING, "folder of the dataset")
    class_labels: Any = option("all", "`all`, a list of classes, or a text file with one class per line")
    num_trajectories: int = option(2000, "guided sampling runs to record", at_least=1)
    num_inference_steps: int = option(20, "denoising steps, and so records, per trajectory", at_least=1)
    guidance_scale: list[float] = option(
        lambda: [1.0, 6.0], "lowest and highest scale; each trajectory draws its own, uniformly"
    )
    shift_timesteps: bool = option(True, "shift each unit's timestep grid, so that all timesteps are covered")
    seed: int = option(0, "seed of the dataset: noise and scales follow from it", at_least=0, at_most=MOST)
    trajectories_per_unit: int = option(50, "trajectories in one shard", at_least=1)
    records_per_sample: int = option(64, "longest part of a trajectory stored as one sample", at_least=1)
    storage_dtype: str = option("float16", "precision of stored latents and targets", one_of=DTYPES)
    batch_size: int = option(50, "trajectories run at once by a worker", at_least=1)
    num_workers: int = option(1, "teachers that run side by side", at_least=1)
    device: str = option("auto", "`auto` (a GPU where there is one), `cuda` or `cpu`")
    num_cpus: float = option(1.0, "CPU cores that Ray keeps for each worker", at_least=0, at_most=4096)
    num_gpus: float = option(0.0, "GPUs that Ray keeps for each worker; 1 on a GPU cluster", at_least=0, at_most=64)
    ray_address: str | None = option(None, "a Ray cluster, or `auto`; by default RAY_ADDRESS, else this machine")
