"""Options of training that contradict each other."""

from __future__ import annotations

from pathlib import Path

from stages.base.single_file import is_gguf
from stages.errors import UsageError
from stages.train.config import TrainConfig


def check_together(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: two options contradict each other.
    """
    for name in ("output_dir", "cache_dir"):
        if "://" in str(getattr(config, name)):
            raise UsageError(f"{name}={getattr(config, name)}: name a local folder; only data_dir can be in a bucket")
    if Path(config.output_dir).resolve() == Path(config.data_dir).resolve():
        raise UsageError(f"output_dir={config.output_dir}: is the dataset's folder: take another one")
    if config.lr_warmup_steps is not None and config.max_train_steps is not None:
        check_warmup(config.lr_warmup_steps, config.max_train_steps)
    if config.adapter.variant == "full":
        if config.gradient_checkpointing:
            raise UsageError(
                "gradient_checkpointing=true: the variant `full` swaps its weights in for the forward pass only: "
                "leave it out"
            )
        if config.quantization != "none":
            raise UsageError(
                f"quantization={config.quantization}: the variant `full` trains the base's weights: leave it out"
            )
        if config.enable_group_offload:
            raise UsageError(
                "enable_group_offload=true: the variant `full` swaps its weights in for the forward pass: leave it out"
            )
    if config.pretrained_model_name_or_path and is_gguf(config.pretrained_model_name_or_path):
        check_gguf(config)
    if config.enable_group_offload:
        check_offloading(config)
    if config.quantization != "none" and not config.gradient_checkpointing:
        raise UsageError(
            f"quantization={config.quantization}: the backward pass would keep every layer's full weight, more than "
            "quantization saves: add gradient_checkpointing=true"
        )


def check_offloading(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: an option contradicts `enable_group_offload`.
    """
    if config.quantization != "none":
        raise UsageError(
            f"enable_group_offload=true: a base in {config.quantization} stays on the GPU, because its scales do not move "
            "with its weights: leave one of the two out"
        )
    if config.torch_compile:
        raise UsageError("enable_group_offload=true: compiled code does not load layers: leave torch_compile out")
    if not config.gradient_checkpointing:
        raise UsageError(
            "enable_group_offload=true: the backward pass would load every layer again for each of its tensors: add "
            "gradient_checkpointing=true"
        )


def check_gguf(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: an option contradicts a base in GGUF, whose layers are quantised.
    """
    chosen = {
        f"quantization={config.quantization}": config.quantization != "none",
        "enable_group_offload=true": config.enable_group_offload,
        "adapter.variant=full": config.adapter.variant == "full",
    }
    for name, given in chosen.items():
        if given:
            raise UsageError(f"{name}: the base {config.pretrained_model_name_or_path} is quantised: leave it out")


def check_split(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: an option contradicts a base that is split over processes.
    """
    if config.enable_group_offload:
        raise UsageError("enable_group_offload=true: --use_fsdp splits the base already: leave one of the two out")
    if config.quantization != "none":
        raise UsageError(
            f"quantization={config.quantization}: --use_fsdp splits plain weights alone: leave one of the two out"
        )
    base = config.pretrained_model_name_or_path
    if base is not None and is_gguf(base):
        raise UsageError(
            f"pretrained_model_name_or_path={base}: --use_fsdp splits plain weights alone, and a base in GGUF is quantised"
        )


def check_warmup(warmup: int, steps: int) -> None:
    """
    Raises:
        UsageError: the learning rate would never reach its peak.
    """
    if warmup >= steps:
        raise UsageError(
            f"lr_warmup_steps={warmup}: the run has {steps} steps: lower it, or leave it out for a tenth of them"
        )
