"""The training loss: the distance to the guided prediction (arXiv 2503.07274), by one of several measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.base.loading import diffusers_class
from stages.records.teacher import TeacherFacts
from stages.train.batch import Batch

SMALLEST_DELTA = 1e-3  # as a share of the target's mean square; below it, rounding errors would dominate
SMALLEST_ERROR = 1e-8  # added under the root, whose slope at 0 is unbounded


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each record `[n]`; prediction and target `[n, ...]`."""
    return functional.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)


class Objective:
    """The loss of each record; g is the guided prediction, c the conditional one.

    Args:
        loss: `l2` is the mean squared error; `rms` is its root, which gives every record a gradient of the same size;
            `l1` is the mean absolute error. The others weight the squared error: `noise_weighted` by the share of noise
            in the latent and `guidance_weighted` by `(1 - cos(c, g)) / 2`, both as in the published reference code;
            `guidance_delta` by `1 / mean((g - c)^2)`, so the loss is the share of the guidance still to learn.
        teacher: the dataset's teacher.
    """

    def __init__(self, loss: str, teacher: TeacherFacts, device: str) -> None:
        self.loss = loss
        self.timestep_scale = teacher.layout.timestep_scale
        self.noise = noise_levels(teacher).to(device) if loss == "noise_weighted" else None

    def __call__(self, prediction: Tensor, batch: Batch) -> Tensor:
        """The loss of each record `[n]`; prediction `[n, ...]`."""
        if self.loss == "l1":
            return functional.l1_loss(prediction.float(), batch.target, reduction="none").flatten(1).mean(1)
        error = squared_error(prediction, batch.target)
        if self.loss == "rms":
            return (error + SMALLEST_ERROR).sqrt()
        return error if self.loss == "l2" else error * self.weight(batch)

    def weight(self, batch: Batch) -> Tensor:
        """The weight of each record `[n]`."""
        if self.noise is not None:
            steps = (batch.timestep / self.timestep_scale).round().long().clamp(0, len(self.noise) - 1)
            return self.noise[steps]
        if self.loss == "guidance_weighted":
            return (1 - batch.guidance_stats["guidance_cosine"]) / 2
        size = batch.target.square().flatten(1).mean(1)
        return 1 / batch.guidance_stats["guidance_delta"].maximum(SMALLEST_DELTA * size)


def noise_levels(teacher: TeacherFacts) -> Tensor:
    """The share of noise in a latent at each of the scheduler's timesteps: the root of 1 minus the cumulated alpha.

    Flow-matching schedulers have no alphas; their share is the timestep divided by the number of timesteps.
    """
    scheduler: Any = diffusers_class(teacher.scheduler_class, "the dataset's scheduler").from_config(
        teacher.scheduler_config
    )
    steps = int(scheduler.config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        return (1 - torch.as_tensor(scheduler.alphas_cumprod).float()).sqrt()
    return torch.arange(steps) / steps
