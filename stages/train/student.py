"""The student: the frozen denoiser of the dataset's teacher with an adapter attached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.conditioning import find_conditions
from stages.adapters.guidance import Guidance, as_scales
from stages.adapters.metadata import AdapterMetadata, Base, RecordedTeacher
from stages.base.arguments import LENGTH, Arguments, Caller
from stages.base.denoiser import NEGATIVE, STEP, as_target, floating_weight, predictions_of
from stages.base.size import DEFAULT_SIZE
from stages.errors import UserError
from stages.records.schema import TensorSpec
from stages.records.teacher import LayoutFacts
from stages.records.trajectory import CONDITION_PREFIX
from stages.train.base import PRECISION, device_of, facts_of_teacher
from stages.train.batch import Batch, split_by_length
from stages.train.offloading import is_offloaded, offloaded_call
from stages.train.sharding import is_split, most_passes, shard

if TYPE_CHECKING:  # a student needs no pyarrow
    from stages.records.dataset import Dataset


def describe_base(
    dataset: Dataset, scale_range: list[float] | None = None, denoiser: str | None = None
) -> AdapterMetadata:
    """The metadata that an adapter's folder keeps: conditions, trained range, identity of the base.

    Args:
        scale_range: the scales that the run was restricted to.
        denoiser: the denoiser's name in the pipeline; by default the first.
    """
    teacher, conditions = facts_of_teacher(dataset, denoiser), dataset.plan.conditions
    low, high = dataset.plan.guidance.scale_range
    least, most = scale_range or [low, high]
    layout = teacher.layout
    return AdapterMetadata(
        conditions=find_conditions(
            {name: asdict(spec) for name, spec in condition_tensors(dataset).items()},
            max(conditions.class_labels, default=0) + 1,
        ),
        sampled=asdict(conditions),
        arguments=teacher.arguments,
        scale_range=[max(low, least), min(high, most)],
        guidance_rule=dataset.plan.guidance.rule,
        prediction_type=teacher.prediction_type,
        timestep=layout.arguments.timestep,
        axes={name: asdict(axis) for name, axis in layout.arguments.axes.items()},
        timestep_scale=layout.timestep_scale,
        timestep_offset=layout.timestep_offset,
        no_guidance=layout.no_guidance,
        scale_offset=layout.scale_offset,
        unconditional=unconditional_place(layout),
        base=Base(**{entry.name: getattr(teacher, entry.name) for entry in fields(Base)}),
        teacher=RecordedTeacher(
            scheduler_class=teacher.scheduler_class,
            scheduler_config=teacher.scheduler_config,
            guider=dataset.info.plans[0].config["teacher"]["guider"],
        ),
        dataset_fingerprint=dataset.fingerprint,
    )


def unconditional_place(layout: LayoutFacts) -> dict[str, int] | None:
    """The position of the unconditional part in a guided step; None if it is unknown."""
    if layout.unconditional is None:
        return None
    call, chunk = layout.unconditional
    return {"call": call, "chunk": chunk, "chunks": layout.chunks}


def example_inputs(dataset: Dataset) -> dict[str, Any]:
    """The denoiser's arguments for three records, flattened, on the meta device."""
    tensors, n, meta = dataset.info.tensors, 3, torch.device("meta")

    def empty(spec: TensorSpec) -> Tensor:
        return torch.empty(n, *spec.shape, dtype=getattr(torch, spec.dtype), device=meta)

    cond = {k: empty(spec) for k, spec in condition_tensors(dataset).items() if not k.startswith(NEGATIVE)}
    cond |= {name: empty(spec) for name, spec in tensors.items() if name.startswith(STEP)}
    return Caller(arguments_of(dataset), meta).flat(empty(tensors["latent"]), empty(tensors["timestep"]), cond)


def arguments_of(dataset: Dataset) -> Arguments:
    """The layout of the arguments of the teacher's denoiser."""
    return dataset.info.teacher.layout.arguments


def condition_tensors(dataset: Dataset) -> dict[str, TensorSpec]:
    """Dtype and shape of the recorded conditions, by the names of the denoiser's arguments."""
    return {
        name.removeprefix(CONDITION_PREFIX): spec
        for name, spec in dataset.info.tensors.items()
        if name.startswith(CONDITION_PREFIX)
    }


class Student:
    """Predicts the guided output of a batch in one conditional pass.

    Args:
        arguments: the layout of the denoiser's arguments in the teacher's calls.
        channels: the channels of each prediction that are in the target.
        constants: by size, the constant arguments that differ there.
        mixed_precision: as given to `load_base` of stages/train/base.py.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        adapter: GuidanceAdapter,
        arguments: Arguments,
        channels: list[int],
        mixed_precision: str = "no",
        constants: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.denoiser, self.adapter = denoiser, adapter.attach(denoiser)
        self.call: Callable[..., Any] = offloaded_call(denoiser) if is_offloaded(denoiser) else denoiser
        self.channels = channels
        device = device_of(denoiser)
        self.callers = {
            size: Caller(replace(arguments, constants=arguments.constants | changed), device)
            for size, changed in (constants or {DEFAULT_SIZE: {}}).items()
        }
        self.precision = PRECISION.get(mixed_precision)
        self.dtype = floating_weight(denoiser).dtype

    @classmethod
    def create(
        cls,
        dataset: Dataset,
        config: AdapterConfig,
        denoiser: nn.Module,
        scale_range: list[float] | None = None,
        mixed_precision: str = "no",
        name: str | None = None,
    ) -> Student:
        """Attach a new adapter to the dataset's denoiser of that name; see `describe_base` for `scale_range`."""
        metadata, inputs = describe_base(dataset, scale_range, name), example_inputs(dataset)
        adapter = GuidanceAdapter.for_denoiser(config, denoiser, metadata, inputs)
        adapter.to(device_of(denoiser))
        channels = list(dataset.info.teacher.layout.target_channels)
        constants = {name: size.constants for name, size in dataset.info.sizes.items()}
        return cls(denoiser, adapter, arguments_of(dataset), channels, mixed_precision, constants)

    def shard(self, device: str) -> None:
        """Split the base over the processes of the run, each share on its process's device; move the adapter there.

        Raises:
            UserError: the base cannot be split.
        """
        shard(self.denoiser, device)
        self.adapter.to(device)
        self.callers = {size: replace(caller, device=torch.device(device)) for size, caller in self.callers.items()}

    def compile(self) -> None:
        """Compile the denoiser with the adapter's hooks."""
        self.call = torch.compile(self.denoiser)

    def checkpoint_gradients(self) -> None:
        """Recompute the base's activations in the backward pass.

        Raises:
            UserError: the denoiser does not support it.
        """
        denoiser: Any = self.denoiser
        if not getattr(denoiser, "_supports_gradient_checkpointing", False):
            raise UserError(f"gradient_checkpointing=true: {type(denoiser).__name__} does not support it: leave it out")
        denoiser.enable_gradient_checkpointing()

    def predict(self, batch: Batch, guided: bool = True) -> Tensor:
        """Predict the target's channels `[n, c, ...]`, without a learned variance.

        One pass per length of the conditions, because the denoiser takes no mask for the padding.

        Args:
            guided: whether the adapter acts, at the batch's scales; else the base predicts alone.
        """
        if any(name.endswith(LENGTH) for name in batch.cond):
            parts = split_by_length(batch)
        else:
            parts = [(torch.arange(len(batch.scale)), batch)]
        # Each process has lengths of its own, or none in this batch, so they agree at each step.
        passes = most_passes(len(parts), batch.latent.device) if is_split(self.denoiser) else len(parts)
        predictions = [self._predict(part, guided) for _, part in parts]
        for _ in range(passes - len(parts)):
            predictions[0] = predictions[0] + 0 * self._predict(parts[0][1], guided)
        if len(parts) == 1:
            return predictions[0]
        return torch.cat(predictions)[torch.cat([chosen for chosen, _ in parts]).argsort()]

    def _predict(self, batch: Batch, guided: bool) -> Tensor:
        """Predict for records of one length, in one pass."""
        if not guided:
            return self._forward(batch)
        negative = {name: value for name, value in batch.cond.items() if name.startswith(NEGATIVE)}
        with self.adapter.guided_by(Guidance(as_scales(batch.scale)[None], negative=negative)):
            return self._forward(batch)

    def _forward(self, batch: Batch) -> Tensor:
        cond = {name: value for name, value in batch.cond.items() if not name.startswith(NEGATIVE)}
        latent, device = batch.latent, batch.latent.device.type
        if torch.is_grad_enabled() and is_split(self.denoiser):
            # A batch at scale 1 needs a backward pass, too, because the other processes have one.
            latent = latent.detach().requires_grad_()
        with torch.autocast(device, self.precision) if self.precision else nullcontext():
            output = self.call(**self.callers[batch.size].nested(latent, batch.timestep, cond), return_dict=False)
        return as_target(predictions_of(output), self.channels)
