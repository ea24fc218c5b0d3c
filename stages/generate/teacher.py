"""The teacher: a stock pipeline run with guidance, one recorded batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stages.base.denoiser import denoiser_of, denoisers_of, fingerprint
from stages.base.loading import choose_device, load_pipeline, new_guider, use_scheduler
from stages.base.sampling import (
    Condition,
    Kept,
    Request,
    decode,
    decoder_input_of,
    guider_of,
    sample,
    synchronize,
    undecoded,
)
from stages.base.size import size_name
from stages.errors import UsageError, UserError
from stages.generate.call_arguments import check_arguments
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.finding import find_layout
from stages.generate.noising import check_noising, noised, sampled
from stages.generate.plan import runs_per_trajectory
from stages.generate.probing import PROBED_SCALES, PROBED_STEPS, rows_by_step
from stages.generate.profile import RECORDING, TEACHER, Clock
from stages.generate.recorder import Recording, record
from stages.generate.scale import PerSampleScale
from stages.generate.size_layouts import layouts_by_size
from stages.generate.splitting import Splitter
from stages.generate.steps import count_steps
from stages.generate.timesteps import shifted_timesteps
from stages.generate.unguided import guidance_rule
from stages.generate.unit import PlannedTrajectory, Unit
from stages.records.teacher import DenoiserFacts, TeacherFacts
from stages.records.trajectory import Trajectory


@dataclass
class TeacherOutput:
    """The teacher's output for a batch, or for all batches of a unit.

    Attributes:
        trajectories: recorded, on the CPU in the storage dtype.
        previews: decoded images `[c, h, w]` in [-1, 1] by trajectory index, for indices below `preview`.
        constants, decoder_input: see `Commit`.
        clock: seconds spent in the pipeline, and on converting its recordings.
    """

    trajectories: list[Trajectory] = field(default_factory=list)
    previews: dict[int, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    decoder_input: list[int] | None = None
    clock: Clock = field(default_factory=Clock)

    def extend(self, other: TeacherOutput) -> None:
        self.trajectories += other.trajectories
        self.previews |= other.previews
        self.constants, self.decoder_input = other.constants, other.decoder_input
        self.clock.update(other.clock)


class Teacher:
    """A loaded pipeline, ready to run units."""

    def __init__(self, config: GenerateConfig, examples: Sequence[Condition]) -> None:
        """
        Args:
            examples: conditions for trial runs, one of each size; if the first has a negative prompt, negative prompts
                are recorded too.

        Raises:
            UserError: it is not certain how the pipeline guides, or its scheduler cannot noise latents
                (`trajectory=diffusion`), or it does not make a size.
        """
        example = examples[0]
        self.config = config
        self.device = choose_device(config.device)
        storage_dtype = dtype_named(config.storage_dtype, "storage_dtype")
        self.pipe: Any = load_teacher(config.teacher, self.device)
        self.arguments = dict(config.teacher.call)
        check_arguments(None if guider_of(self.pipe) else type(self.pipe), self.arguments, config.teacher)
        self.arguments |= {k: v for k in ("height", "width") if (v := getattr(config.teacher, k)) is not None}
        whole = Request([example], [0], config.num_inference_steps, self.arguments)
        with self._shifted(0.5):
            rows = rows_by_step(self.pipe, whole, PROBED_SCALES[0])
            request, expected = self._request_to_probe(whole, {*rows})
            self.layout = find_layout(self.pipe, request, expected)
            self.layouts = layouts_by_size(self.pipe, self.layout, request, examples)
        self.evaluations_per_trajectory = sum(map(sum, rows)) * runs_per_trajectory(config)
        if config.trajectory == "diffusion":
            check_noising(self.pipe, self.layout, request)
        self.steps_per_trajectory = count_steps(config.teacher, config.num_inference_steps)
        self.splitter = Splitter(
            self.layout.denoisers, storage_dtype, config.records_per_sample, with_negative="negative_prompt" in example
        )

    def _request_to_probe(self, whole: Request, rows: set[tuple[int, ...]]) -> tuple[Request, int]:
        """The request of a trial and its resulting number of steps: as few as show each kind of step of the whole run.

        Args:
            whole: the request of one trajectory; rows: in the denoiser calls of its steps, as `rows_by_step` counts.
        """
        probed, expected = steps_to_probe(self.config)
        few = replace(whole, num_inference_steps=probed)
        if rows == {*rows_by_step(self.pipe, few, PROBED_SCALES[0])}:
            return few, expected
        return whole, count_steps(self.config.teacher, whole.num_inference_steps)

    def _shifted(self, shift: float) -> AbstractContextManager[None]:
        return shifted_timesteps(self.pipe.scheduler, shift) if self.config.shift_timesteps else nullcontext()

    def facts(self) -> TeacherFacts:
        name, denoiser = denoiser_of(self.pipe)
        denoisers = {name: module for name, module in denoisers_of(self.pipe).items() if name in self.layout.denoisers}
        scheduler, config = self.pipe.scheduler, self.config.teacher
        return TeacherFacts(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            pipeline_class=type(self.pipe).__name__,
            denoiser_class=type(denoiser).__name__,
            denoiser_subfolder=name,
            denoiser_fingerprint=fingerprint(denoiser),
            denoisers={
                name: DenoiserFacts(
                    type(module).__name__, fingerprint(module), getattr(module, "config", {}).get("in_channels")
                )
                for name, module in denoisers.items()
            },
            torch_dtype=config.torch_dtype,
            scheduler_class=type(scheduler).__name__,
            scheduler_config={k: v for k, v in scheduler.config.items() if not k.startswith("_")},
            prediction_type=scheduler.config.get("prediction_type"),
            guidance_rule=guidance_rule(self.pipe, self.arguments),
            arguments=self.arguments,
            layout=self.layout,
            config=config.config,
        )

    def run(self, unit: Unit) -> TeacherOutput:
        """Record the trajectories of a unit, in its order.

        Raises:
            UserError: a recorded number is not finite, or does not fit into the storage dtype.
        """
        together = self.layout.scale_per_sample and not self.layout.one_sample
        size = self.config.batch_size if together else 1
        output = TeacherOutput()
        for start in range(0, len(unit.trajectories), size):
            output.extend(self._run_batch(unit.trajectories[start : start + size], unit.shift))
        return output

    def _run_batch(self, batch: Sequence[PlannedTrajectory], shift: float) -> TeacherOutput:
        clock = Clock()
        with clock.spent_on(TEACHER):
            recording, kept = self._record(batch, shift)
            previews = self._previews(batch, kept[0])
            decoder_input = decoder_input_of(self.pipe, kept)
            synchronize(self.pipe)
        with clock.spent_on(RECORDING):
            trajectories = list(self.splitter.split(batch, recording))
        layout = self.layouts[size_name(batch[0].condition)]
        return TeacherOutput(trajectories, previews, layout.changed_constants(self.layout), decoder_input, clock)

    def _record(self, batch: Sequence[PlannedTrajectory], shift: float) -> tuple[Recording, Kept]:
        """The recording of a batch of n trajectories, and their final latents."""
        scales = torch.tensor([planned.guidance_scale - self.layout.scale_offset for planned in batch])
        scale = PerSampleScale(scales) if self.layout.scale_per_sample else float(scales[0])
        layout = self.layouts[size_name(batch[0].condition)]
        steps = None if batch[0].steps is None else torch.tensor([planned.steps for planned in batch])
        request = Request(
            [planned.condition for planned in batch],
            [planned.seed for planned in batch],
            self.config.num_inference_steps,
            self.arguments,
        )
        with ExitStack() as stack:
            kept = stack.enter_context(undecoded(self.pipe))
            stack.enter_context(self._shifted(shift))
            if self.config.trajectory == "diffusion":
                with sampled(self.pipe, layout, len(batch)) as clean:
                    sample(self.pipe, request, scale)
            recorder = stack.enter_context(record(self.pipe, layout, len(batch), steps))
            if self.config.trajectory == "diffusion":
                stack.enter_context(noised(self.pipe, clean[0], request.seeds, recorder))
            sample(self.pipe, request, scale)
        self._check_steps(recorder.step)
        return recorder.recording(), kept

    def _check_steps(self, taken: int) -> None:
        if taken != self.steps_per_trajectory:
            raise UserError(
                f"{type(self.pipe).__name__}: took {taken} steps, where its scheduler makes "
                f"{self.steps_per_trajectory} of num_inference_steps={self.config.num_inference_steps}: leave out what cuts "
                "them (teacher.call.NAME=...)"
            )

    def _previews(self, batch: Sequence[PlannedTrajectory], latents: Tensor) -> dict[int, Tensor]:
        shown = [i for i, planned in enumerate(batch) if planned.index < self.config.preview]
        if not shown:
            return {}
        images = decode(self.pipe, latents[shown]).cpu()
        return {batch[i].index: image for i, image in zip(shown, images, strict=True)}


def steps_to_probe(config: GenerateConfig) -> tuple[int, int]:
    """(`num_inference_steps`, resulting number of steps) of a trial, as few as show how a pipeline guides."""
    few = range(PROBED_STEPS, config.num_inference_steps)
    counted = ((asked, count_steps(config.teacher, asked)) for asked in few if _leaves_steps(config, asked))
    whole = config.num_inference_steps, count_steps(config.teacher, config.num_inference_steps)
    return next((pair for pair in counted if pair[1] >= PROBED_STEPS - 1), whole)


def _leaves_steps(config: GenerateConfig, asked: int) -> bool:
    try:
        return count_steps(config.teacher, asked) > 0
    except UsageError:
        return False


def load_teacher(config: TeacherConfig, device: str) -> Any:
    """Load the pipeline that a configuration names, with its guider and scheduler, onto a device."""
    dtype = dtype_named(config.torch_dtype, "teacher.torch_dtype")
    source = {"config": config.config, "revision": config.revision, "variant": config.variant}
    place = "cpu" if config.offload_text_encoder else device
    kind = "ModularPipeline" if config.guider else config.pipeline_class
    pipe: Any = load_pipeline(config.pretrained_model_name_or_path, dtype, place, kind, **source)
    if config.guider:
        pipe.update_components(guider=new_guider(dict(config.guider)))
    if config.offload_text_encoder:
        if device == "cpu":
            raise UserError("teacher.offload_text_encoder=true: there is no GPU to keep it off")
        pipe.enable_model_cpu_offload(device=device)
    if config.scheduler is not None:
        use_scheduler(pipe, config.scheduler, "teacher.scheduler")
    return pipe


def dtype_named(name: str, key: str) -> torch.dtype:
    """The torch dtype of an option's value; `key` is the option, for the error."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UserError(f"{key}={name}: one of {', '.join(known)}")
    return known[name]
