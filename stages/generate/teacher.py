"""The teacher: a stock pipeline run with guidance, one recorded batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from stages.base.arguments import LENGTH
from stages.base.denoiser import denoiser_of, denoisers_of, fingerprint
from stages.base.loading import choose_device, load_pipeline, new_guider, use_scheduler
from stages.base.sampling import Condition, Request, decode, guider_of, sample, synchronize, undecoded
from stages.errors import UsageError, UserError
from stages.generate.call_arguments import check_arguments
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.finding import find_layout
from stages.generate.noising import check_noising, noised, sampled
from stages.generate.plan import PlannedTrajectory, Unit
from stages.generate.probing import PROBED_STEPS
from stages.generate.profile import RECORDING, TEACHER, Clock
from stages.generate.recorder import Recording, record
from stages.generate.scale import PerSampleScale
from stages.generate.steps import count_steps
from stages.generate.timesteps import shifted_timesteps
from stages.generate.unguided import guidance_rule
from stages.records.trajectory import Trajectory


class Teacher:
    """A pipeline with its weights, ready to run units.

    Attributes:
        previews: decoded images `[c, h, w]` in [-1, 1] of the first trajectories, as many as `preview` asks, by index.
        clock: seconds spent in the pipeline, and on taking over what was recorded in it.
    """

    def __init__(self, config: GenerateConfig, example: Condition) -> None:
        """
        Args:
            example: a condition to try the pipeline out on; where it has a negative prompt, those are recorded too.

        Raises:
            UserError: how the pipeline guides is not certain, or its latents cannot be noised where that is asked for.
        """
        self.config = config
        self.device = choose_device(config.device)
        self.storage_dtype = dtype_named(config.storage_dtype, "storage_dtype")
        self.pipe: Any = load_teacher(config.teacher, self.device)
        self.arguments = dict(config.teacher.call)
        check_arguments(None if guider_of(self.pipe) else type(self.pipe), self.arguments, config.teacher)
        self.arguments |= {k: v for k in ("height", "width") if (v := getattr(config.teacher, k)) is not None}
        probed, expected = steps_to_probe(config)
        request = Request([example], [0], probed, self.arguments)
        with self._shifted(0.5):
            self.layout = find_layout(self.pipe, request, expected)
        if config.trajectory == "diffusion":
            check_noising(self.pipe, self.layout, request)
        self.steps_per_trajectory = count_steps(config.teacher, config.num_inference_steps)
        self.records_negative = "negative_prompt" in example
        self.previews: dict[int, Tensor] = {}
        self.clock = Clock()

    def _shifted(self, shift: float) -> AbstractContextManager[None]:
        return shifted_timesteps(self.pipe.scheduler, shift) if self.config.shift_timesteps else nullcontext()

    def facts(self) -> dict[str, Any]:
        """What `dataset.json` tells of the teacher; equal on every worker of a run."""
        name, denoiser = denoiser_of(self.pipe)
        denoisers = {name: module for name, module in denoisers_of(self.pipe).items() if name in self.layout.denoisers}
        scheduler, config = self.pipe.scheduler, self.config.teacher
        return {
            "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
            "revision": config.revision,
            "variant": config.variant,
            "pipeline_class": type(self.pipe).__name__,
            "denoiser_class": type(denoiser).__name__,
            "denoiser_subfolder": name,
            "denoiser_fingerprint": fingerprint(denoiser),
            "denoisers": {
                name: {
                    "denoiser_class": type(module).__name__,
                    "denoiser_fingerprint": fingerprint(module),
                    "in_channels": getattr(module, "config", {}).get("in_channels"),
                }
                for name, module in denoisers.items()
            },
            "torch_dtype": config.torch_dtype,
            "scheduler_class": type(scheduler).__name__,
            "scheduler_config": {k: v for k, v in scheduler.config.items() if not k.startswith("_")},
            "prediction_type": scheduler.config.get("prediction_type"),
            "guidance_rule": guidance_rule(self.pipe, self.arguments),
            "arguments": self.arguments,
            "layout": self.layout.facts(),
        }

    def run(self, unit: Unit) -> Iterator[Trajectory]:
        """The recorded trajectories of a unit, in its order, on the CPU in the storage dtype.

        Raises:
            UserError: the teacher gave, or storing would give, a number that is not finite.
        """
        together = self.layout.scale_per_sample and not self.layout.one_sample
        size = self.config.batch_size if together else 1
        for start in range(0, len(unit.trajectories), size):
            batch = unit.trajectories[start : start + size]
            with self.clock.spent_on(TEACHER):
                recording = self._record(batch, unit.shift)
                synchronize(self.pipe)
            with self.clock.spent_on(RECORDING):
                trajectories = list(self._split(batch, recording))
            yield from trajectories

    def _record(self, batch: list[PlannedTrajectory], shift: float) -> Recording:
        scales = torch.tensor([planned.guidance_scale - self.layout.scale_offset for planned in batch])
        scale = PerSampleScale(scales) if self.layout.scale_per_sample else float(scales[0])
        steps = None if batch[0].steps is None else torch.tensor([planned.steps for planned in batch])
        request = Request(
            [planned.condition for planned in batch],
            [planned.seed for planned in batch],
            self.config.num_inference_steps,
            self.arguments,
        )
        with ExitStack() as stack:
            latents = stack.enter_context(undecoded(self.pipe))
            stack.enter_context(self._shifted(shift))
            if self.config.trajectory == "diffusion":
                with sampled(self.pipe, self.layout, len(batch)) as clean:
                    sample(self.pipe, request, scale)
            recorder = stack.enter_context(record(self.pipe, self.layout, len(batch), steps))
            if self.config.trajectory == "diffusion":
                stack.enter_context(noised(self.pipe, clean[0], request.seeds, recorder))
            sample(self.pipe, request, scale)
        if recorder.step != self.steps_per_trajectory:
            raise UserError(
                f"{type(self.pipe).__name__}: took {recorder.step} steps, where its scheduler makes "
                f"{self.steps_per_trajectory} of num_inference_steps={self.config.num_inference_steps}: leave out what cuts "
                "them (teacher.call.NAME=...)"
            )
        shown = [i for i, planned in enumerate(batch) if planned.index < self.config.preview]
        if shown:
            images = decode(self.pipe, latents[0][shown]).cpu()
            self.previews |= {batch[i].index: image for i, image in zip(shown, images, strict=True)}
        return recorder.recording()

    def _split(self, batch: list[PlannedTrajectory], recording: Recording) -> Iterator[Trajectory]:
        def planned_at(record: int) -> str:
            owner, step = int(recording.owner[record]), int(recording.step[record])
            return f"trajectory {batch[owner].index}, step {step}"

        latent = self._stored(recording.latent, "latent", planned_at)
        target = self._stored(recording.target, "target", planned_at)
        whole = {
            name: self._stored(value, name, lambda i: f"trajectory {batch[i].index}") if value.ndim > 2 else value.cpu()
            for name, value in (recording.cond | (recording.negative if self.records_negative else {})).items()
        }
        cond = {name: trimmed(value, whole.get(name + LENGTH)) for name, value in whole.items() if LENGTH not in name}
        steps = {name: self._stored(value, name, planned_at) for name, value in recording.steps.items()}
        timestep = recording.timestep.cpu()
        cosine, delta = recording.guidance_cosine.cpu(), recording.guidance_delta.cpu()
        for i, planned in enumerate(batch):
            part = 0
            for number, denoiser in enumerate(self.layout.denoisers):
                mine = (recording.owner == i) & (recording.denoiser == number)
                if not mine.any():
                    continue
                yield Trajectory(
                    index=planned.index,
                    part=part,
                    seed=planned.seed,
                    guidance_scale=planned.guidance_scale,
                    condition=planned.condition,
                    denoiser=denoiser,
                    latent=latent[mine],
                    timestep=timestep[mine],
                    target=target[mine],
                    steps={name: value[mine] for name, value in steps.items()},
                    cond={name: value[i] for name, value in cond.items()},
                    guidance_cosine=cosine[mine],
                    guidance_delta=delta[mine],
                )
                part += math.ceil(int(mine.sum()) / self.config.records_per_sample)

    def _stored(self, values: Tensor, name: str, place: Callable[[int], str]) -> Tensor:
        """`[m, ...]` in the storage dtype on the CPU, every number of it finite."""
        if not values.is_floating_point():
            return values.cpu()
        stored = values.to(self.storage_dtype)
        if not bool(stored.isfinite().all()):
            first = int((~stored.isfinite()).flatten(1).any(1).nonzero()[0])
            overflow = bool(values[first].isfinite().all())
            cause = f"does not fit into storage_dtype={self.config.storage_dtype}" if overflow else "is not finite"
            raise UserError(f"{place(first)}: the teacher's {name} {cause}")
        return stored.cpu()


def steps_to_probe(config: GenerateConfig) -> tuple[int, int]:
    """(`num_inference_steps` of a trial, the steps that are left of them): as few as show how a pipeline guides."""
    few = range(PROBED_STEPS, config.num_inference_steps)
    counted = ((asked, count_steps(config.teacher, asked)) for asked in few if _leaves_steps(config, asked))
    whole = config.num_inference_steps, count_steps(config.teacher, config.num_inference_steps)
    return next((pair for pair in counted if pair[1] >= PROBED_STEPS - 1), whole)


def _leaves_steps(config: GenerateConfig, asked: int) -> bool:
    try:
        return count_steps(config.teacher, asked) > 0
    except UsageError:
        return False


def trimmed(values: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The values of each sample, without what they were filled up with."""
    return [(value if lengths is None else value[: int(lengths[i])]).clone() for i, value in enumerate(values)]


def load_teacher(config: TeacherConfig, device: str) -> Any:
    """The pipeline that a configuration names, on its device, with the scheduler it asks for."""
    dtype = dtype_named(config.torch_dtype, "teacher.torch_dtype")
    source = {"revision": config.revision, "variant": config.variant}
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
    """The torch dtype of a configuration's word for it."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UserError(f"{key}={name}: one of {', '.join(known)}")
    return known[name]
