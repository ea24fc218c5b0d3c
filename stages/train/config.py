"""The options of training, named as in diffusers' training scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from stages.adapters import AdapterConfig
from stages.configuration.options import option

LOSSES = ("rms", "l2", "l1", "noise_weighted", "guidance_weighted", "guidance_delta")
ON_DAMAGE = ("stop", "skip")
PRECISIONS = ("no", "bf16", "fp16")
QUANTIZATIONS = ("none", "int8", "fp8", "int4", "nf4")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup")
# A resumed run must draw the same records and hold out the same trajectories; the user may change all other options.
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
# Options that affect neither the final weights nor their validation.
WITHOUT_EFFECT = frozenset(
    {
        "data_dir",
        "cache_dir",
        "cache_bytes",
        "output_dir",
        "pretrained_model_name_or_path",
        "max_train_steps",
        "gradient_checkpointing",
        "enable_group_offload",
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
        MISSING,
        "folder of the dataset, on disk, in a bucket (`s3://bucket/prefix`, `gs://`, `az://`) or on the hub "
        "(`hf://datasets/OWNER/NAME@REVISION`)",
    )
    output_dir: str = option(MISSING, "folder for the adapter, its checkpoints and logs")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pretrained_model_name_or_path: str | None = option(None, "the frozen base; by default the dataset's teacher")
    seed: int = option(
        0, "seed of the adapter's initialization and of the order of records", at_least=0, at_most=2**31 - 1
    )
    train_batch_size: int = option(64, "records per batch and process", at_least=1)
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", at_least=1)
    max_train_steps: int | None = option(
        None, "optimizer steps; by default 4 passes over the records, but 1000 to 10000 steps", at_least=1
    )
    loss: str = option(
        "rms",
        "`rms`: root of each record's mean squared error; `l1`; `l2`; or l2 weighted by the share of noise in the "
        "latent (`noise_weighted`), by how far guidance turns the prediction (`guidance_weighted`), or by the inverse "
        "square of what guidance adds (`guidance_delta`)",
        one_of=LOSSES,
    )
    learning_rate: float | None = option(
        None, "peak learning rate of AdamW; by default the variant's own", above=0, at_most=1e3
    )
    lr_scheduler: str = option("cosine", "schedule, by its name in diffusers.optimization", one_of=SCHEDULES)
    lr_warmup_steps: int | None = option(None, "steps of linear warm-up; by default a tenth of the run", at_least=0)
    adam_weight_decay: float = option(0.0, "weight decay of AdamW", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    use_ema: bool = option(False, "validate and save an exponential moving average of the adapter's weights")
    ema_decay: float = option(0.999, "maximum decay of the average", at_least=0, at_most=1)
    mixed_precision: str = option(
        "no",
        "`no`, `bf16` or `fp16`: precision of the frozen base; the adapter's weights stay in fp32",
        one_of=PRECISIONS,
    )
    gradient_checkpointing: bool = option(False, "recompute the base's activations in the backward pass: less memory")
    quantization: str = option(
        "none",
        "quantize the linear layers of the frozen base: `int8`, `fp8` or `int4` by torchao, `nf4` by bitsandbytes; needs "
        "gradient_checkpointing=true",
        one_of=QUANTIZATIONS,
    )
    enable_group_offload: bool = option(
        False,
        "keep the frozen base in the CPU's memory, each layer on the GPU while it runs; needs gradient_checkpointing=true",
    )
    torch_compile: bool = option(False, "compile the denoiser with its adapter")
    scale_range: list[float] | None = option(None, "train only on records with a guidance scale in [LOW,HIGH]")
    timestep_range: list[float] | None = option(
        None, "train only on records with a timestep, as the denoiser receives it, in [LOW,HIGH]"
    )
    max_trajectories: int | None = option(
        None, "train only on that many trajectories, the first of the plan", at_least=1
    )
    denoiser: str | None = option(
        None, "the denoiser to adapt, by its name in the pipeline, if the teacher has several"
    )
    filters: list[Any] | None = option(
        None,
        "train only on samples whose manifest row passes all of these, such as [[class_label,in,[1,2]]]",
        kind=list[list[Any]] | None,
    )
    shuffle_bytes: int = option(
        1 << 30, "size of the shuffle window: bytes of samples that are in memory together", at_least=1
    )
    cache_dir: str | None = option(
        None, "local cache folder for shards, which several runs may share; by default shards are read in place"
    )
    cache_bytes: int = option(
        1 << 36, "maximum size of the cache; the least recently read shards are removed", at_least=1
    )
    on_damage: str = option(
        "stop",
        "at a damaged shard, `stop`, or `skip` its damaged records; `training.json` counts them",
        one_of=ON_DAMAGE,
    )
    validation_share: float = option(
        0.05, "share of trajectories held out for validation, at least one", above=0, at_most=0.99
    )
    validation_steps: int | None = option(
        None, "steps between two validations; by default a quarter of the run, at most 1000", at_least=1
    )
    vae_name_or_path: str | None = option(
        None, "folder or hub id of a pipeline or a VAE: each validation decodes some held-out samples into images"
    )
    logging_steps: int = option(50, "steps between two log entries", at_least=1)
    checkpointing_steps: int = option(1000, "steps between two checkpoints", at_least=1)
    checkpoints_total_limit: int = option(2, "number of checkpoints to keep", at_least=1)
    resume_from_checkpoint: str | None = option(
        None, "`latest`, which starts a new run if there is none, or a checkpoint's file"
    )
    report_to: str = option("tensorboard", "`tensorboard`, the name of another accelerate tracker, or `none`")
    device: str = option("auto", "`auto` (a GPU if there is one), `cuda` or `cpu`")


def effective(config: TrainConfig) -> dict[str, Any]:
    """The options that determine the final weights and their validation."""
    return {key: value for key, value in asdict(config).items() if key not in WITHOUT_EFFECT}
