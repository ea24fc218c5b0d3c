"""What is minimised: the distance to the guided prediction (arXiv 2503.07274), by one of several measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.base.loading import diffusers_class
from stages.records.teacher import TeacherFacts
from stages.train.batch import Batch

SMALLEST_DELTA = 1e-3  # as a share of the target's mean square: where guidance adds less, rounding would weigh too much
SMALLEST_ERROR = 1e-8  # within the root, whose slope at 0 has no bound


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each record `[n]`, from predictions and targets `[n, ...]`."""
    return functional.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)


class Objective:
    """The loss of each record; g is the guided prediction, c the conditional one.

    Args:
        loss: `l2` is the mean squared error, `rms` its root, whose gradient is as large for every record, `l1` the mean absolute
            error, the others the squared one weighed: `noise_weighted` by the share of noise in the latent and
            `guidance_weighted` by `(1 - cos(c, g)) / 2`, both as in the published reference code, `guidance_delta` by
            `1 / mean((g - c)^2)`, so that it is the share of the guidance that is left to learn.
        teacher: of the dataset.
    """

    def __init__(self, loss: str, teacher: TeacherFacts, device: str) -> None:
        self.loss = loss
        self.timestep_scale = teacher.layout.timestep_scale
        self.noise = noise_levels(teacher).to(device) if loss == "noise_weighted" else None

    def __call__(self, prediction: Tensor, batch: Batch) -> Tensor:
        """`[n]` from predictions `[n, ...]` of the records of a batch."""
        if self.loss == "l1":
            return functional.l1_loss(prediction.float(), batch.target, reduction="none").flatten(1).mean(1)
        error = squared_error(prediction, batch.target)
        if self.loss == "rms":
            return (error + SMALLEST_ERROR).sqrt()
        return error if self.loss == "l2" else error * self.weight(batch)

    def weight(self, batch: Batch) -> Tensor:
        """Of each record `[n]`."""
        if self.noise is not None:
            steps = (batch.timestep / self.timestep_scale).round().long().clamp(0, len(self.noise) - 1)
            return self.noise[steps]
        if self.loss == "guidance_weighted":
            return (1 - batch.guidance_stats["guidance_cosine"]) / 2
        size = batch.target.square().flatten(1).mean(1)
        return 1 / batch.guidance_stats["guidance_delta"].maximum(SMALLEST_DELTA * size)


def noise_levels(teacher: TeacherFacts) -> Tensor:
    """The share of noise in a latent at each of the scheduler's timesteps: the root of 1 minus the cumulated alpha.

    For schedulers of flow matching, which have none, it is the timestep itself as a share.
    """
    scheduler: Any = diffusers_class(teacher.scheduler_class, "the dataset's scheduler").from_config(
        teacher.scheduler_config
    )
    steps = int(scheduler.config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        return (1 - torch.as_tensor(scheduler.alphas_cumprod).float()).sqrt()
    return torch.arange(steps) / steps
