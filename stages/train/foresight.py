"""What a run tells before its base is loaded: how the layers are held, and the peak of its memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import nn

from stages.adapters import GuidanceAdapter
from stages.base.arguments import LENGTH
from stages.base.loading import diffusers_class, first_line
from stages.base.single_file import is_gguf
from stages.errors import UserError
from stages.records.trajectory import CONDITION_PREFIX
from stages.train.base import base_config, computing_dtype, facts_of_teacher, is_incomparable, place_of_base
from stages.train.batch import Batch
from stages.train.defaults import RunConfig
from stages.train.memory import default_dtype, fake_tensors, hold, modellable, step_bytes
from stages.train.objective import squared_error
from stages.train.quantization import INT4_GROUP
from stages.train.sharding import is_asked
from stages.train.student import Student, arguments_of, describe_base, example_inputs

if TYPE_CHECKING:
    from stages.records.dataset import Dataset

GB, MB = 10**9, 10**6
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def foresee(dataset: Dataset, config: RunConfig, name: str, scale_range: list[float] | None, predict: bool) -> str:
    """A line: how many layers are held in which precision and where; with `predict` also the peak of memory.

    Raises:
        UserError: the base's configuration cannot be found, or is not the teacher's; with `predict` also what the
            adapter's options or gradient_checkpointing do not fit.
    """
    kind = diffusers_class(facts_of_teacher(dataset, name).denoiser_class, "denoiser_class")
    settings = base_config(dataset, config.pretrained_model_name_or_path, name)
    dtype = computing_dtype(dataset, config.mixed_precision)
    in_gguf = is_gguf(place_of_base(facts_of_teacher(dataset, name), config.pretrained_model_name_or_path)[0])
    with torch.device("meta"):
        layers = describe_layers(
            kind.from_config(settings), config, "GGUF" if in_gguf else NAMES.get(dtype, str(dtype))
        )
    if is_incomparable(facts_of_teacher(dataset, name), config.pretrained_model_name_or_path):
        layers += f", from {config.pretrained_model_name_or_path}, which cannot be compared with the teacher's weights"
    if not predict:
        return layers
    if in_gguf:
        return f"{layers}; the peak of memory of a base in GGUF cannot be predicted"
    try:
        peak = predict_peak(dataset, config, kind, settings, name, scale_range)
    except UserError:
        raise
    except Exception as error:  # the code of a denoiser may read values, which fake tensors do not have
        return f"{layers}; the peak of memory cannot be predicted: {first_line(error)[:200]}"
    size = f"{peak / GB:.1f} GB" if peak >= GB / 10 else f"{peak / MB:.1f} MB"
    return f"{layers}; predicted peak {'of a whole base ' if is_asked() else ''}{size}"


def describe_layers(denoiser: nn.Module, config: RunConfig, precision: str) -> str:
    """Such as `base: 780 linear layers in nf4, 95 others in bf16`."""
    layers = [module for module in denoiser.modules() if module._parameters]
    quantised = [layer for layer in layers if is_quantised(layer, config.quantization)]
    others = f"{len(layers) - len(quantised)} %s in {precision}"
    held = (
        f"{len(quantised)} linear layers in {config.quantization}, {others % 'others'}"
        if quantised
        else others % "layers"
    )
    place = ", offloaded layer by layer" if config.enable_group_offload else ""
    if is_asked():
        place = f", split over {PartialState().num_processes} processes"
    return f"base: {held}{place}"


def is_quantised(layer: nn.Module, kind: str) -> bool:
    if kind == "none" or type(layer) is not nn.Linear:
        return False
    return kind != "int4" or layer.in_features % INT4_GROUP == 0


def predict_peak(
    dataset: Dataset,
    config: RunConfig,
    kind: Any,
    settings: dict[str, Any],
    name: str,
    scale_range: list[float] | None,
) -> int:
    """The bytes at the peak of a step of this run, by the model of stages/train/memory.py."""
    config = modellable(config)
    dtype = computing_dtype(dataset, config.mixed_precision)
    with torch.random.fork_rng(devices=[]), fake_tensors(config.train_batch_size):
        with torch.device("cpu"), default_dtype(dtype):
            denoiser = kind.from_config(settings).eval().requires_grad_(False)
        hold(denoiser, config.quantization)
        with torch.device("meta"):  # where a trial of its layers needs no values
            layers = kind.from_config(settings)
        metadata, inputs = describe_base(dataset, scale_range, name), example_inputs(dataset)
        adapter = GuidanceAdapter.for_denoiser(config.adapter, layers, metadata, inputs)
        channels = list(dataset.info.teacher.layout.target_channels)
        constants = {size: facts.constants for size, facts in dataset.info.sizes.items()}
        student = Student(denoiser, adapter, arguments_of(dataset), channels, config.mixed_precision, constants)
        if config.gradient_checkpointing:
            student.checkpoint_gradients()
        batch = made_up_batch(dataset, config.train_batch_size).to("cpu", dtype)
        bytes_of = step_bytes(student, config, lambda: squared_error(student.predict(batch), batch.target).mean())
    return bytes_of["peak"]


def made_up_batch(dataset: Dataset, n: int) -> Batch:
    """A batch of n records of the dataset's largest size; `torch.tensor` keeps its values on a fake tensor."""
    sizes = dataset.info.sizes
    size = max(sizes, key=lambda name: math.prod(sizes[name].tensors["latent"].shape))
    tensors = sizes[size].tensors

    def ones(name: str) -> torch.Tensor:
        if name.endswith(LENGTH):
            return torch.tensor([1] * n)
        spec = tensors[name]
        value = torch.ones if spec.dtype == "bool" or spec.dtype.startswith("float") else torch.zeros
        return value(n, *spec.shape, dtype=getattr(torch, spec.dtype))

    cond = {name.removeprefix(CONDITION_PREFIX): ones(name) for name in tensors if name.startswith(CONDITION_PREFIX)}
    return Batch(ones("latent"), torch.tensor([500] * n), ones("target"), torch.tensor([2.0] * n), cond, size=size)
