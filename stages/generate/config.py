"""The options of generation. All but `EXECUTION_KEYS` define the dataset's content."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from stages.configuration.options import option

EXECUTION_KEYS = frozenset(
    {
        "output_dir",
        "num_workers",
        "batch_size",
        "ray_address",
        "num_cpus",
        "num_gpus",
        "resources",
        "runtime_env",
        "unit_timeout",
        "device",
        "preview",
    }
)
DTYPES = ("float32", "float16", "bfloat16")
TRAJECTORIES = ("guided", "diffusion")
DISTRIBUTIONS = ("uniform", "log_uniform", "list")
MOST = 2**31 - 1


@dataclass
class TeacherConfig:
    pretrained_model_name_or_path: str = option(
        MISSING, "folder or hub id of a stock diffusers pipeline, or a file of weights"
    )
    config: str | None = option(
        None,
        "if the weights are one file (.safetensors, .ckpt, .gguf): folder or hub id of the pipeline's configuration",
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    variant: str | None = option(None, "variant of the weights' files, e.g. fp16")
    torch_dtype: str = option("float32", "precision the teacher runs in", one_of=DTYPES)
    pipeline_class: str | None = option(None, "a pipeline class of diffusers; by default the one that the model names")
    scheduler: str | None = option(
        None, "a scheduler class of diffusers in place of the model's own, with its configuration"
    )
    guider: dict[str, Any] = option(
        dict, "run the model's modular pipeline with a guider of diffusers: its class as `name`, and its settings"
    )
    height: int | None = option(None, "height of the images in pixels; by default the pipeline's own", at_least=8)
    width: int | None = option(None, "width of the images in pixels; by default the pipeline's own", at_least=8)
    sizes: list[Any] = option(
        list,
        "several sizes, in turn: each [width,height] in pixels, or [width,height,frames] of a video; in place of height "
        "and width",
        kind=list[list[int]],
    )
    offload_text_encoder: bool = option(False, "keep on the GPU only the component that is running")
    call: dict[str, Any] = option(dict, "anything else that the pipeline's `__call__` takes: teacher.call.NAME=...")


@dataclass
class GenerateConfig:
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    output_dir: str = option(
        MISSING, "folder of the dataset, on disk or in a bucket: `s3://bucket/prefix`, `gs://`, `az://`"
    )
    prompts: str | None = option(
        None,
        "a file or `s3://` object, in UTF-8: .txt with one prompt per line, or .jsonl, .csv, .parquet with a column prompt "
        "and perhaps negative_prompt, seed, guidance_scale, class_label, width, height, num_frames; and image, mask_image, "
        "video: paths, relative to the file, of pictures that the pipeline takes",
    )
    class_labels: Any = option(
        "all", "without prompts: `all`, a list, or a text file with one class per line", kind=str | list[int]
    )
    num_trajectories_per_condition: int = option(1, "guided sampling runs of each prompt or class", at_least=1)
    num_trajectories: int | None = option(
        None, "in place of that: how many in all, prompts or classes taking turns", at_least=1
    )
    trajectory: str = option(
        "guided",
        "what is recorded: the steps of a guided sampling run, or `diffusion`, its result noised to every timestep and "
        "guided there, at twice the cost, to compare with",
        one_of=TRAJECTORIES,
    )
    num_inference_steps: int = option(20, "denoising steps per trajectory", at_least=1)
    num_recorded_steps: int | None = option(
        None, "so many random steps of each trajectory are kept; by default all", at_least=1
    )
    guidance_scale: list[float] = option(
        lambda: [1.0, 6.0],
        "lowest and highest scale; each trajectory draws its own; with `list`, the scales to draw from",
    )
    guidance_scale_distribution: str = option("uniform", "how scales are drawn", one_of=DISTRIBUTIONS)
    shift_timesteps: bool = option(True, "shift each unit's timestep grid, so that all timesteps are covered")
    seed: int = option(0, "seed of the dataset: noise and scales follow from it", at_least=0, at_most=MOST)
    trajectories_per_unit: int = option(50, "trajectories in one shard", at_least=1)
    records_per_sample: int = option(64, "longest part of a trajectory stored as one sample", at_least=1)
    storage_dtype: str = option("float16", "precision of stored latents, targets and token embeddings", one_of=DTYPES)
    batch_size: int = option(50, "trajectories run at once by a worker", at_least=1)
    preview: int = option(0, "decode the first so many trajectories into preview.png", at_least=0, at_most=1024)
    num_workers: int = option(1, "teachers that run side by side", at_least=1)
    device: str = option("auto", "`auto` (a GPU where there is one), `cuda` or `cpu`")
    num_cpus: float = option(1.0, "CPU cores that Ray keeps for each worker", at_least=0, at_most=4096)
    num_gpus: float = option(
        0.0,
        "GPUs that Ray keeps for each worker; 1 on a GPU cluster, 0.5 for two workers on each",
        at_least=0,
        at_most=64,
    )
    resources: dict[str, float] = option(dict, "custom resources of Ray that each worker takes: resources.NAME=1")
    runtime_env: dict[str, Any] = option(
        dict, "Ray's runtime environment of the workers: runtime_env.env_vars.NAME=..., runtime_env.pip=[...]"
    )
    unit_timeout: float = option(
        3600.0, "seconds after which a unit, or loading the teacher, counts as hung: its worker is replaced", above=0
    )
    ray_address: str | None = option(None, "a Ray cluster, or `auto`; by default RAY_ADDRESS, else this machine")


def place_of(config: GenerateConfig) -> str:
    """A worker's resources on the cluster, as options."""
    resources = [f"resources.{name}={amount:g}" for name, amount in config.resources.items()]
    return " ".join([f"num_cpus={config.num_cpus:g}", f"num_gpus={config.num_gpus:g}", *resources])
