"""What training can be told; the names are those of diffusers' training scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from stages.adapters import AdapterConfig
from stages.configuration.options import option
from stages.errors import UsageError

LOSSES = ("rms", "l2", "l1", "noise_weighted", "guidance_weighted", "guidance_delta")
ON_DAMAGE = ("stop", "skip")
PRECISIONS = ("no", "bf16", "fp16")
QUANTIZATIONS = ("none", "int8")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup")
# A resumed run must draw the same records and hold out the same trajectories; what else changes is the user's choice.
KEPT_WHEN_RESUMED = (
    "adapter",
    "seed",
    "train_batch_size",
    "gradient_accumulation_steps",
    "use_ema",
    "shuffle_bytes",
    "validation_share",
    "scale_range",
    "timestep_range",
    "max_trajectories",
    "denoiser",
    "filters",
)
# What changes neither the weights that a run ends with nor how they are judged.
WITHOUT_EFFECT = frozenset(
    {
        "data_dir",
        "cache_dir",
        "cache_bytes",
        "output_dir",
        "pretrained_model_name_or_path",
        "max_train_steps",
        "gradient_checkpointing",
        "torch_compile",
        "on_damage",
        "validation_steps",
        "vae_name_or_path",
        "logging_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "device",
    }
)


@dataclass
class TrainConfig:
    data_dir: str = option(
        MISSING, "folder of the dataset, on disk or in a bucket: `s3://bucket/prefix`, `gs://`, `az://`"
    )
    output_dir: str = option(MISSING, "folder of the adapter, its checkpoints and logs")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pretrained_model_name_or_path: str | None = option(
        None, "the frozen base; by default the teacher that the dataset names"
    )
    seed: int = option(0, "seed of the adapter's start and of the order of records", at_least=0, at_most=2**31 - 1)
    train_batch_size: int = option(64, "records at once, of each process", at_least=1)
    gradient_accumulation_steps: int = option(1, "batches that make one optimizer step", at_least=1)
    max_train_steps: int = option(5000, "optimizer steps", at_least=1)
    loss: str = option(
        "rms",
        "`rms`, the root of each record's mean squared error; `l1`, `l2`; l2 weighed, as `noise_weighted` by the share of noise "
        "in the latent, as `guidance_weighted` by how far guidance turns the prediction, as `guidance_delta` by one over the "
        "square of what guidance adds",
        one_of=LOSSES,
    )
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", above=0, at_most=1e3)
    lr_scheduler: str = option("cosine", "schedule, by its name in diffusers.optimization", one_of=SCHEDULES)
    lr_warmup_steps: int = option(200, "steps of linear warm-up", at_least=0)
    adam_weight_decay: float = option(0.0, "weight decay of AdamW", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    use_ema: bool = option(False, "validate and save an exponential moving average of the adapter's weights")
    ema_decay: float = option(0.999, "most that the average keeps at a step", at_least=0, at_most=1)
    mixed_precision: str = option(
        "no",
        "`no`, `bf16` or `fp16`: precision of the frozen base; the adapter's weights stay in fp32",
        one_of=PRECISIONS,
    )
    gradient_checkpointing: bool = option(
        False, "compute the base's activations again in the backward pass: less memory"
    )
    quantization: str = option(
        "none",
        "`int8`: hold the linear layers of the frozen base in 8 bits, by torchao; with gradient_checkpointing",
        one_of=QUANTIZATIONS,
    )
    torch_compile: bool = option(False, "compile the denoiser with its adapter")
    scale_range: list[float] | None = option(None, "train on records with a guidance scale in [LOW,HIGH] only")
    timestep_range: list[float] | None = option(None, "and a timestep, as the denoiser is given it, in [LOW,HIGH] only")
    max_trajectories: int | None = option(None, "train on so many trajectories only, the first of the plan", at_least=1)
    denoiser: str | None = option(
        None, "of a teacher with several denoisers, the one that the adapter is for, by its name in the pipeline"
    )
    filters: list[Any] | None = option(
        None, "train on samples whose row of the manifest passes all of these only, such as [[class_label,in,[1,2]]]"
    )
    shuffle_bytes: int = option(1 << 30, "records are drawn across a window of so many bytes of samples", at_least=1)
    cache_dir: str | None = option(
        None, "local folder that shards are fetched into, for several runs if you like; by default read where they are"
    )
    cache_bytes: int = option(1 << 36, "most that it holds; shards read least lately are removed", at_least=1)
    on_damage: str = option(
        "stop",
        "at a damaged shard: `stop`, or `skip` its damaged records, which `training.json` counts",
        one_of=ON_DAMAGE,
    )
    validation_share: float = option(
        0.05, "share of trajectories held out for validation, at least one", above=0, at_most=0.99
    )
    validation_steps: int = option(1000, "steps between two validations", at_least=1)
    vae_name_or_path: str | None = option(
        None, "folder or hub id of a pipeline or a VAE: each validation shows what some held-out predictions decode to"
    )
    logging_steps: int = option(50, "steps between two points of the log", at_least=1)
    checkpointing_steps: int = option(1000, "steps between two checkpoints", at_least=1)
    checkpoints_total_limit: int = option(2, "older checkpoints are removed", at_least=1)
    resume_from_checkpoint: str | None = option(
        None, "`latest`, which begins where there is none, or a checkpoint's file"
    )
    report_to: str = option("tensorboard", "`tensorboard`, another tracker of accelerate by its name, or `none`")
    device: str = option("auto", "`auto` (a GPU where there is one), `cuda` or `cpu`")


def effective(config: TrainConfig) -> dict[str, Any]:
    """The options that the weights at the end follow from, and how they are judged."""
    return {key: value for key, value in asdict(config).items() if key not in WITHOUT_EFFECT}


def check_together(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: two options are at odds.
    """
    for name in ("output_dir", "cache_dir"):
        if "://" in str(getattr(config, name)):
            raise UsageError(
                f"{name}={getattr(config, name)}: a local folder is needed; only data_dir can be in a bucket"
            )
    if Path(config.output_dir).resolve() == Path(config.data_dir).resolve():
        raise UsageError(f"output_dir={config.output_dir}: is the dataset: take another folder")
    if config.adapter.variant == "full":
        if config.gradient_checkpointing:
            raise UsageError(
                "gradient_checkpointing=true: `full` lends its weights to the forward pass only: leave it out"
            )
        if config.quantization != "none":
            raise UsageError(f"quantization={config.quantization}: `full` trains the base's own weights: leave it out")
    if config.quantization != "none" and not config.gradient_checkpointing:
        raise UsageError(
            f"quantization={config.quantization}: every layer's whole weight would be kept for the backward pass, more than is "
            "saved: add gradient_checkpointing=true"
        )
