"""Splitting a batch's recording into trajectories, in the dtype that they are stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.base.arguments import LENGTH
from stages.base.pictures import PICTURES
from stages.base.places import public
from stages.base.sampling import Condition
from stages.errors import UserError
from stages.generate.recorder import Recording
from stages.generate.unit import PlannedTrajectory
from stages.records.trajectory import Trajectory, dtype_name


@dataclass(frozen=True)
class Splitter:
    """Splits recordings.

    Attributes:
        denoisers: the teacher's, in the order of the layout.
        dtype: of stored floating-point tensors with more than two dimensions, and of latents and targets.
        records_per_sample: the longest part of a trajectory that is stored as one sample.
        with_negative: whether to keep the token embeddings of the unconditional pass.
    """

    denoisers: tuple[str, ...]
    dtype: torch.dtype
    records_per_sample: int
    with_negative: bool

    def split(self, batch: Sequence[PlannedTrajectory], recording: Recording) -> Iterator[Trajectory]:
        """The trajectories of a batch, in its order, on the CPU; one for each denoiser that ran.

        Raises:
            UserError: a number is not finite, or does not fit into the storage dtype.
        """

        def record_name(record: int) -> str:
            owner, step = int(recording.owner[record]), int(recording.step[record])
            return f"trajectory {batch[owner].index}, step {step}"

        latent = self._stored(recording.latent, "latent", record_name)
        target = self._stored(recording.target, "target", record_name)
        steps = {name: self._stored(value, name, record_name) for name, value in recording.steps.items()}
        timestep = recording.timestep.cpu()
        cosine, delta = recording.guidance_cosine.cpu(), recording.guidance_delta.cpu()
        cond = self._conditions(batch, recording)
        for i, planned in enumerate(batch):
            part = 0
            for number, denoiser in enumerate(self.denoisers):
                rows = (recording.owner == i) & (recording.denoiser == number)
                if not rows.any():
                    continue
                yield Trajectory(
                    index=planned.index,
                    part=part,
                    seed=planned.seed,
                    scale=planned.guidance_scale,
                    condition=_published(planned.condition),
                    denoiser=denoiser,
                    latent=latent[rows],
                    timestep=timestep[rows],
                    target=target[rows],
                    steps={name: value[rows] for name, value in steps.items()},
                    cond={name: value[i] for name, value in cond.items()},
                    guidance_cosine=cosine[rows],
                    guidance_delta=delta[rows],
                )
                part += math.ceil(int(rows.sum()) / self.records_per_sample)

    def _conditions(self, batch: Sequence[PlannedTrajectory], recording: Recording) -> dict[str, list[Tensor]]:
        """By name, one tensor for each trajectory, without padding."""
        whole = {
            name: self._stored(value, name, lambda i: f"trajectory {batch[i].index}") if value.ndim > 2 else value.cpu()
            for name, value in (recording.cond | (recording.negative if self.with_negative else {})).items()
        }
        return {name: trimmed(value, whole.get(name + LENGTH)) for name, value in whole.items() if LENGTH not in name}

    def _stored(self, values: Tensor, name: str, name_of: Callable[[int], str]) -> Tensor:
        """`[m, ...]` in the storage dtype on the CPU, every number of it finite."""
        if not values.is_floating_point():
            return values.cpu()
        stored = values.to(self.dtype)
        if not bool(stored.isfinite().all()):
            first = int((~stored.isfinite()).flatten(1).any(1).nonzero()[0])
            overflow = bool(values[first].isfinite().all())
            cause = f"does not fit into storage_dtype={dtype_name(self.dtype)}" if overflow else "is not finite"
            raise UserError(f"{name_of(first)}: the teacher's {name} {cause}")
        return stored.cpu()


def _published(condition: Condition) -> Condition:
    """A condition without the folders of its pictures: a shard is uploaded as it is."""
    return {name: public(value) if name in PICTURES else value for name, value in condition.items()}


def trimmed(values: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Each sample's values without padding."""
    return [(value if lengths is None else value[: int(lengths[i])]).clone() for i, value in enumerate(values)]
