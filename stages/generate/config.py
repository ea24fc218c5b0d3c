"""What generation can be told. The fields of `GenerateConfig` that define the dataset are all but `EXECUTION_KEYS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

EXECUTION_KEYS = frozenset({"output_dir", "num_workers", "batch_size", "ray_address", "num_cpus", "num_gpus", "device"})


@dataclass
class TeacherConfig:
    pretrained_model_name_or_path: str = field(
        default=MISSING, metadata={"help": "folder or hub id of a stock diffusers pipeline"}
    )
    torch_dtype: str = field(default="float32", metadata={"help": "precision the teacher runs in"})


@dataclass
class GenerateConfig:
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    output_dir: str = field(default=MISSING, metadata={"help": "folder of the dataset"})
    class_labels: Any = field(
        default="all", metadata={"help": "`all`, a list of classes, or a text file with one class per line"}
    )
    num_trajectories: int = field(default=2000, metadata={"help": "guided sampling runs to record"})
    num_inference_steps: int = field(default=20, metadata={"help": "denoising steps, and so records, per trajectory"})
    guidance_scale: list[float] = field(
        default_factory=lambda: [1.0, 6.0],
        metadata={"help": "lowest and highest scale; each trajectory draws its own, uniformly"},
    )
    shift_timesteps: bool = field(
        default=True, metadata={"help": "shift each unit's timestep grid, so that all timesteps are covered"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the dataset: noise and scales follow from it"})
    trajectories_per_unit: int = field(default=50, metadata={"help": "trajectories in one shard"})
    records_per_sample: int = field(default=64, metadata={"help": "longest part of a trajectory stored as one sample"})
    storage_dtype: str = field(default="float16", metadata={"help": "precision of stored latents and targets"})
    batch_size: int = field(default=50, metadata={"help": "trajectories run at once by a worker"})
    num_workers: int = field(default=1, metadata={"help": "teachers that run side by side"})
    device: str = field(default="auto", metadata={"help": "`auto` (a GPU where there is one), `cuda` or `cpu`"})
    num_cpus: float = field(default=1.0, metadata={"help": "CPU cores that Ray keeps for each worker"})
    num_gpus: float = field(default=0.0, metadata={"help": "GPUs that Ray keeps for each worker; 1 on a GPU cluster"})
    ray_address: str | None = field(
        default=None, metadata={"help": "a Ray cluster, or `auto`; by default RAY_ADDRESS, else this machine"}
    )
