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
from stages.base.denoiser import NEGATIVE, STEP, as_target, fingerprint, predictions_of
from stages.base.loading import denoiser_config, load_denoiser
from stages.base.size import DEFAULT_SIZE
from stages.errors import UserError
from stages.records.schema import TensorSpec
from stages.records.teacher import LayoutFacts, TeacherFacts
from stages.records.trajectory import CONDITION_PREFIX
from stages.train.batch import Batch, split_by_length
from stages.train.sharding import shard

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


def load_base(
    dataset: Dataset,
    name_or_path: str | None = None,
    device: str = "cpu",
    mixed_precision: str = "no",
    quantization: str = "none",
    denoiser: str | None = None,
) -> nn.Module:
    """Load the frozen denoiser that the records were made with.

    Args:
        mixed_precision: dtype of the base, `bf16` or `fp16`; by default the teacher's.
        quantization: `int8` for linear layers with 8-bit weights.
        denoiser: the denoiser's name in the pipeline; by default the first.

    Raises:
        UserError: the denoiser found differs from the teacher's in class or in weights.
    """
    teacher = facts_of_teacher(dataset, denoiser)
    path = name_or_path or teacher.pretrained_model_name_or_path
    source: dict[str, Any] = {} if name_or_path else {"revision": teacher.revision, "variant": teacher.variant}
    place = path, teacher.denoiser_subfolder, teacher.denoiser_class
    check_architecture(dataset, teacher, path, denoiser_config(*place, revision=source.get("revision")))
    base = load_denoiser(*place, getattr(torch, teacher.torch_dtype), **source)
    found = fingerprint(base)
    if found != teacher.denoiser_fingerprint:
        raise UserError(
            f"{path}: not the weights that made {dataset.root}: fingerprint {found[:12]}, the dataset has "
            f"{teacher.denoiser_fingerprint[:12]}: name the teacher's with pretrained_model_name_or_path=..."
        )
    if mixed_precision != "no":
        cast(base, PRECISION[mixed_precision])
    if quantization == "int8":
        quantize(base)
    return base.to(device)


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


def quantize(denoiser: nn.Module) -> None:
    """Hold the weights of the linear layers in 8 bits.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("quantization=int8: torchao is not installed: pip install '.[quantization]'") from error
    quantize_(denoiser, Int8WeightOnlyConfig())


class Student:
    """Predicts the guided output of a batch in one conditional pass.

    Args:
        arguments: the layout of the denoiser's arguments in the teacher's calls.
        channels: the channels of each prediction that are in the target.
        constants: by size, the constant arguments that differ there.
        mixed_precision: as given to `load_base`.
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
        self.call: Callable[..., Any] = denoiser
        self.channels = channels
        device = next(denoiser.parameters()).device
        self.callers = {
            size: Caller(replace(arguments, constants=arguments.constants | changed), device)
            for size, changed in (constants or {DEFAULT_SIZE: {}}).items()
        }
        self.precision = PRECISION.get(mixed_precision)
        self.dtype = next(denoiser.parameters()).dtype

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
        adapter.to(next(denoiser.parameters()).device)
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

        Args:
            guided: whether the adapter acts, at the batch's scales; else the base predicts alone.
        """
        if any(name.endswith(LENGTH) for name in batch.cond):
            return self._predict_by_length(batch, guided)
        if not guided:
            return self._forward(batch)
        negative = {name: value for name, value in batch.cond.items() if name.startswith(NEGATIVE)}
        with self.adapter.guided_by(Guidance(as_scales(batch.scale)[None], negative=negative)):
            return self._forward(batch)

    def _predict_by_length(self, batch: Batch, guided: bool) -> Tensor:
        """Run one pass per length, because the denoiser takes no mask for the padding."""
        parts = [(chosen, self.predict(part, guided)) for chosen, part in split_by_length(batch)]
        order = torch.cat([chosen for chosen, _ in parts]).argsort()
        return torch.cat([prediction for _, prediction in parts])[order]

    def _forward(self, batch: Batch) -> Tensor:
        cond = {name: value for name, value in batch.cond.items() if not name.startswith(NEGATIVE)}
        device = batch.latent.device.type
        with torch.autocast(device, self.precision) if self.precision else nullcontext():
            output = self.call(**self.callers[batch.size].nested(batch.latent, batch.timestep, cond), return_dict=False)
        return as_target(predictions_of(output), self.channels)
