"""The frozen base of a run: found, checked, and held as the options say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import get_parameter_device
from torch import nn

from stages.base.denoiser import fingerprint
from stages.base.loading import denoiser_config, load_denoiser
from stages.base.single_file import is_gguf
from stages.errors import UserError
from stages.records.teacher import TeacherFacts
from stages.train.offloading import offload
from stages.train.quantization import quantize

if TYPE_CHECKING:  # a student needs no pyarrow
    from stages.records.dataset import Dataset

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def facts_of_teacher(dataset: Dataset, denoiser: str | None = None) -> TeacherFacts:
    """The facts of the teacher in `dataset.json`, with those of one denoiser; by default the first."""
    teacher = dataset.info.teacher
    name = denoiser or teacher.denoiser_subfolder
    chosen = teacher.denoisers[name]
    return replace(
        teacher,
        denoiser_subfolder=name,
        denoiser_class=chosen.denoiser_class,
        denoiser_fingerprint=chosen.denoiser_fingerprint,
    )


def computing_dtype(dataset: Dataset, mixed_precision: str) -> torch.dtype:
    """The precision in which the base computes: the option's, or by default the teacher's."""
    return PRECISION.get(mixed_precision) or getattr(torch, dataset.info.teacher.torch_dtype)


def load_base(
    dataset: Dataset,
    name_or_path: str | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
    quantization: str = "none",
    denoiser: str | None = None,
    offloaded: bool = False,
) -> nn.Module:
    """Load the frozen denoiser that the records were made with.

    Args:
        mixed_precision: dtype of the base, `bf16` or `fp16`; by default the teacher's.
        quantization: how the weights of linear layers are held, see `quantize`.
        denoiser: the denoiser's name in the pipeline; by default the first.
        offloaded: whether the weights stay in the CPU's memory, and layers come to the device to run.

    Raises:
        UserError: the denoiser found differs from the teacher's in class or in weights.
    """
    teacher = facts_of_teacher(dataset, denoiser)
    base_config(dataset, name_or_path, denoiser)
    path, source = place_of_base(teacher, name_or_path)
    stored = getattr(torch, teacher.torch_dtype)
    dtype = computing_dtype(dataset, mixed_precision) if is_gguf(path) else stored
    base = load_denoiser(path, teacher.denoiser_subfolder, teacher.denoiser_class, dtype, **source)
    found = fingerprint(base)
    if found != teacher.denoiser_fingerprint and not is_incomparable(teacher, name_or_path):
        raise UserError(
            f"{path}: not the weights that made {dataset.root}: fingerprint {found[:12]}, the dataset has "
            f"{teacher.denoiser_fingerprint[:12]}: name the teacher's with pretrained_model_name_or_path=..."
        )
    if mixed_precision != "no" and not is_gguf(path):
        cast(base, PRECISION[mixed_precision])
    quantize(base, quantization, device)
    if offloaded:
        offload(base, device)
        return base
    return base.to(device)


def place_of_base(teacher: TeacherFacts, name_or_path: str | None) -> tuple[str, dict[str, str | None]]:
    """Where the base is and, if it is one file, its configuration; of the teacher's own also the revision and variant."""
    if name_or_path:
        return name_or_path, {"config": teacher.config or teacher.pretrained_model_name_or_path}
    source = {"config": teacher.config, "revision": teacher.revision, "variant": teacher.variant}
    return teacher.pretrained_model_name_or_path, source


def is_incomparable(teacher: TeacherFacts, name_or_path: str | None) -> bool:
    """Whether a base was quantised from weights that may be the teacher's, which nobody can tell from them."""
    return name_or_path is not None and is_gguf(name_or_path) and not is_gguf(teacher.pretrained_model_name_or_path)


def base_config(dataset: Dataset, name_or_path: str | None, denoiser: str | None) -> dict[str, Any]:
    """The configuration of the base, whose weights are not loaded.

    Raises:
        UserError: there is none, or it is not of the teacher's class or number of latent channels.
    """
    teacher = facts_of_teacher(dataset, denoiser)
    path, source = place_of_base(teacher, name_or_path)
    place = path, teacher.denoiser_subfolder, teacher.denoiser_class, source["config"]
    config = denoiser_config(*place, revision=source.get("revision"))
    check_architecture(dataset, teacher, path, config)
    return config


def check_architecture(dataset: Dataset, teacher: TeacherFacts, path: str, config: dict[str, Any]) -> None:
    """Check a denoiser's configuration before its weights are loaded.

    Raises:
        UserError: its class or its number of latent channels differs from the teacher's.
    """
    expected, had = teacher.denoiser_class, teacher.denoisers[teacher.denoiser_subfolder].in_channels
    channels = config.get("in_channels")
    if config.get("_class_name", expected) != expected:
        raise UserError(f"{path}: a {config['_class_name']}, and {dataset.root} was made with a {expected}")
    if channels != had:
        raise UserError(f"{path}: takes latents of {channels} channels, and {dataset.root} was made with {had}")


def cast(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Convert to another precision, except the modules that the model class keeps in fp32."""
    denoiser.to(dtype)
    kept = getattr(denoiser, "_keep_in_fp32_modules", None) or []
    for name, module in denoiser.named_modules():
        if any(part in name.split(".") for part in kept):
            module.float()


def device_of(denoiser: nn.Module) -> torch.device:
    """The device where a denoiser computes; the weights of an offloaded one are elsewhere."""
    return get_parameter_device(denoiser)


def parameters_of(denoiser: nn.Module) -> int:
    """The number of a denoiser's weights; those of quantised layers count as before."""
    packed = {id(m.weight): m.in_features * m.out_features for m in denoiser.modules() if isinstance(m, nn.Linear)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in denoiser.parameters())
