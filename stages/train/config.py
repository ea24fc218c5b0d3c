"""What training can be told; the names are those of diffusers' training scripts."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from stages.adapters import AdapterConfig


@dataclass
class TrainConfig:
    data_dir: str = field(default=MISSING, metadata={"help": "folder of the dataset"})
    output_dir: str = field(default=MISSING, metadata={"help": "folder of the adapter, its checkpoints and logs"})
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "the frozen base; by default the teacher that the dataset names"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the adapter's start and of the order of records"})
    train_batch_size: int = field(default=64, metadata={"help": "records per step"})
    max_train_steps: int = field(default=5000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    lr_scheduler: str = field(default="cosine", metadata={"help": "schedule, by its name in diffusers.optimization"})
    lr_warmup_steps: int = field(default=200, metadata={"help": "steps of linear warm-up"})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "weight decay of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: str = field(default="no", metadata={"help": "`no` or `bf16`; the adapter's weights stay in fp32"})
    shuffle_bytes: int = field(
        default=1 << 30, metadata={"help": "records are drawn across a window of so many bytes of samples"}
    )
    validation_share: float = field(default=0.05, metadata={"help": "share of trajectories held out for validation"})
    validation_steps: int = field(default=1000, metadata={"help": "steps between two validations"})
    logging_steps: int = field(default=50, metadata={"help": "steps between two points of the log"})
    checkpointing_steps: int = field(default=1000, metadata={"help": "steps between two checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "older checkpoints are removed"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "`latest`, or a checkpoint's file"})
    report_to: str = field(default="tensorboard", metadata={"help": "`tensorboard` or `none`"})
    device: str = field(default="auto", metadata={"help": "`auto` (a GPU where there is one), `cuda` or `cpu`"})
