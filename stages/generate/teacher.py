"""The teacher: a stock pipeline run with guidance, one recorded batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from stages.base import choose_device, denoiser_of, fingerprint, load_pipeline, undecoded
from stages.errors import UserError
from stages.generate.config import GenerateConfig
from stages.generate.plan import PlannedTrajectory, Unit
from stages.generate.recorder import Recording, record, shifted_timesteps
from stages.records.record import Trajectory

# Any scale above 1 makes a pipeline run both passes; the recorder then puts each sample's own in its place.
SCALE_THAT_GUIDES = 2.0


class Teacher:
    """A pipeline with its weights, ready to run units."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.storage_dtype = dtype_named(config.storage_dtype, "storage_dtype")
        dtype = dtype_named(config.teacher.torch_dtype, "teacher.torch_dtype")
        self.pipe: Any = load_pipeline(config.teacher.pretrained_model_name_or_path, dtype, self.device)

    def facts(self) -> dict[str, Any]:
        """What `dataset.json` tells of the teacher; equal on every worker of a run."""
        name, denoiser = denoiser_of(self.pipe)
        scheduler = self.pipe.scheduler
        return {
            "pretrained_model_name_or_path": self.config.teacher.pretrained_model_name_or_path,
            "pipeline_class": type(self.pipe).__name__,
            "denoiser_class": type(denoiser).__name__,
            "denoiser_subfolder": name,
            "denoiser_fingerprint": fingerprint(denoiser),
            "torch_dtype": self.config.teacher.torch_dtype,
            "scheduler_class": type(scheduler).__name__,
            "scheduler_config": {k: v for k, v in scheduler.config.items() if not k.startswith("_")},
            "prediction_type": scheduler.config.get("prediction_type"),
        }

    def run(self, unit: Unit) -> Iterator[Trajectory]:
        """The recorded trajectories of a unit, in its order, on the CPU in the storage dtype.

        Raises:
            UserError: the teacher gave, or storing would give, a number that is not finite.
        """
        size = self.config.batch_size
        for start in range(0, len(unit.trajectories), size):
            batch = unit.trajectories[start : start + size]
            yield from self._split(batch, self._record(batch, unit.shift))

    def _record(self, batch: list[PlannedTrajectory], shift: float) -> Recording:
        labels = [planned.class_label for planned in batch]
        requested = {"class_labels": torch.tensor(labels, device=self.device)}
        scales = torch.tensor([planned.guidance_scale for planned in batch], device=self.device)
        with ExitStack() as stack:
            stack.enter_context(undecoded(self.pipe))
            if self.config.shift_timesteps:
                stack.enter_context(shifted_timesteps(self.pipe.scheduler, shift))
            recorder = stack.enter_context(record(self.pipe, scales, requested))
            self.pipe(
                class_labels=labels,
                guidance_scale=SCALE_THAT_GUIDES,
                generator=[torch.Generator().manual_seed(planned.seed) for planned in batch],
                num_inference_steps=self.config.num_inference_steps,
                output_type="pt",
            )
        return recorder.recording()

    def _split(self, batch: list[PlannedTrajectory], recording: Recording) -> Iterator[Trajectory]:
        latent = self._stored(recording.latent, "latent", batch)
        target = self._stored(recording.target, "target", batch)
        timestep, cond = recording.timestep.cpu(), {name: value.cpu() for name, value in recording.cond.items()}
        for i, planned in enumerate(batch):
            yield Trajectory(
                index=planned.index,
                seed=planned.seed,
                guidance_scale=planned.guidance_scale,
                condition={"class_label": planned.class_label},
                latent=latent[:, i],
                timestep=timestep[:, i],
                target=target[:, i],
                cond={name: value[i] for name, value in cond.items()},
            )

    def _stored(self, values: Tensor, name: str, batch: list[PlannedTrajectory]) -> Tensor:
        """`[k, n, ...]` in the storage dtype on the CPU, every number of it finite."""
        stored = values.to(self.storage_dtype)
        if not bool(stored.isfinite().all()):
            step, i = (~stored.isfinite()).flatten(2).any(2).nonzero()[0].tolist()
            overflow = bool(values[step, i].isfinite().all())
            cause = f"does not fit into {self.config.storage_dtype}" if overflow else "is not finite"
            raise UserError(f"trajectory {batch[i].index}, step {step}: the teacher's {name} {cause}")
        return stored.cpu()


def dtype_named(name: str, key: str) -> torch.dtype:
    """The torch dtype of a configuration's word for it."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UserError(f"{key}={name}: one of {', '.join(known)}")
    return known[name]
