"""What is minimised: the distance to the guided prediction (arXiv 2503.07274), by one of several measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.base import diffusers_class

LOSSES = ("l2", "l1", "noise_weighted")


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each record `[n]`, from predictions and targets `[n, ...]`."""
    return functional.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)


class Objective:
    """The loss of each record.

    Args:
        loss: one of `LOSSES`: `l2` is the mean squared error, `l1` the mean absolute one, `noise_weighted` the squared one times the
            share of noise in the latent, as in the published reference code.
        teacher: what the dataset tells of the teacher.
    """

    def __init__(self, loss: str, teacher: dict[str, Any], device: str) -> None:
        self.loss = loss
        self.timestep_scale = teacher["layout"]["timestep_scale"]
        self.noise = noise_levels(teacher).to(device) if loss == "noise_weighted" else None

    def __call__(self, prediction: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
        """`[n]` from predictions and targets `[n, ...]` at timesteps `[n]`, as the denoiser is given them."""
        if self.loss == "l1":
            return functional.l1_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
        error = squared_error(prediction, target)
        if self.noise is None:
            return error
        steps = (timestep / self.timestep_scale).round().long().clamp(0, len(self.noise) - 1)
        return self.noise[steps] * error


def noise_levels(teacher: dict[str, Any]) -> Tensor:
    """The share of noise in a latent at each of the scheduler's timesteps: the root of 1 minus the cumulated alpha.

    For schedulers of flow matching, which have none, it is the timestep itself as a share.
    """
    scheduler: Any = diffusers_class(teacher["scheduler_class"], "the dataset's scheduler").from_config(
        teacher["scheduler_config"]
    )
    steps = int(scheduler.config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        return (1 - torch.as_tensor(scheduler.alphas_cumprod).float()).sqrt()
    return torch.arange(steps) / steps
