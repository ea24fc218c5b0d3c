"""The teacher: a stock pipeline run with guidance, one recorded batch at a time."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor

from stages.base import choose_device, diffusers_class, first_line, load_pipeline, use_scheduler
from stages.denoiser import denoiser_of, fingerprint
from stages.errors import UserError
from stages.generate.config import GenerateConfig, TeacherConfig
from stages.generate.layout import find_layout, guidance_rule
from stages.generate.noising import check_noising, noised, sampled
from stages.generate.plan import PlannedTrajectory, Unit
from stages.generate.profile import RECORDING, TEACHER, Clock
from stages.generate.recorder import Recording, record
from stages.generate.scale import PerSampleScale
from stages.generate.schedule import shifted_timesteps
from stages.records.record import Trajectory
from stages.sampling import Condition, Request, decode, guider_of, sample, synchronize, undecoded


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
        self.arguments |= {k: v for k in ("height", "width") if (v := getattr(config.teacher, k)) is not None}
        check_arguments(self.pipe, self.arguments)
        request = Request([example], [0], config.num_inference_steps, self.arguments)
        self.layout = find_layout(self.pipe, request)
        if config.trajectory == "diffusion":
            check_noising(self.pipe, self.layout, request)
        if not self.layout.scale_per_sample and config.batch_size > 1:
            raise UserError(
                f"{type(self.pipe).__name__}: its guidance cannot hold several scales in one batch: record with batch_size=1"
            )
        self.records_negative = "negative_prompt" in example
        self.previews: dict[int, Tensor] = {}
        self.clock = Clock()

    def facts(self) -> dict[str, Any]:
        """What `dataset.json` tells of the teacher; equal on every worker of a run."""
        name, denoiser = denoiser_of(self.pipe)
        scheduler, told = self.pipe.scheduler, self.config.teacher
        return {
            "pretrained_model_name_or_path": told.pretrained_model_name_or_path,
            "revision": told.revision,
            "variant": told.variant,
            "pipeline_class": type(self.pipe).__name__,
            "denoiser_class": type(denoiser).__name__,
            "denoiser_subfolder": name,
            "denoiser_fingerprint": fingerprint(denoiser),
            "torch_dtype": told.torch_dtype,
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
        size = self.config.batch_size
        for start in range(0, len(unit.trajectories), size):
            batch = unit.trajectories[start : start + size]
            with self.clock.spent_on(TEACHER):
                recording = self._record(batch, unit.shift)
                synchronize(self.pipe)
            with self.clock.spent_on(RECORDING):
                trajectories = list(self._split(batch, recording))
            yield from trajectories

    def _record(self, batch: list[PlannedTrajectory], shift: float) -> Recording:
        scales = torch.tensor([planned.guidance_scale for planned in batch])
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
            if self.config.shift_timesteps:
                stack.enter_context(shifted_timesteps(self.pipe.scheduler, shift))
            if self.config.trajectory == "diffusion":
                with sampled(self.pipe, self.layout, len(batch)) as clean:
                    sample(self.pipe, request, scale)
            recorder = stack.enter_context(record(self.pipe, self.layout, len(batch), steps))
            if self.config.trajectory == "diffusion":
                stack.enter_context(noised(self.pipe, clean[0], request.seeds, recorder))
            sample(self.pipe, request, scale)
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
        cond = {
            name: self._stored(value, name, lambda i: f"trajectory {batch[i].index}") if value.ndim > 2 else value.cpu()
            for name, value in (recording.cond | (recording.negative if self.records_negative else {})).items()
        }
        timestep = recording.timestep.cpu()
        cosine, delta = recording.guidance_cosine.cpu(), recording.guidance_delta.cpu()
        for i, planned in enumerate(batch):
            mine = recording.owner == i
            yield Trajectory(
                index=planned.index,
                seed=planned.seed,
                guidance_scale=planned.guidance_scale,
                condition=planned.condition,
                latent=latent[mine],
                timestep=timestep[mine],
                target=target[mine],
                cond={name: value[i] for name, value in cond.items()},
                guidance_cosine=cosine[mine],
                guidance_delta=delta[mine],
            )

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


def new_guider(settings: dict[str, Any]) -> Any:
    """A guider of diffusers from its class's `name` and its settings."""
    kind = diffusers_class(str(settings.pop("name", None)), "teacher.guider.name")
    if not issubclass(kind, BaseGuidance):
        raise UserError(f"teacher.guider.name={kind.__name__}: no guider")
    try:
        return kind(**settings)
    except TypeError as error:
        raise UserError(f"teacher.guider: {kind.__name__} does not take that: {first_line(error)}") from error


def check_arguments(pipe: Any, arguments: dict[str, Any]) -> None:
    """Refuse what a pipeline's `__call__` does not take."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in arguments:
        if guider_of(pipe) is None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"teacher.call.{name}: {type(pipe).__name__} takes no such argument{hint}")


def dtype_named(name: str, key: str) -> torch.dtype:
    """The torch dtype of a configuration's word for it."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UserError(f"{key}={name}: one of {', '.join(known)}")
    return known[name]
