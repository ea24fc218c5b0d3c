"""What is minimised: the squared error to the guided prediction (arXiv 2503.07274)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each record `[n]`, from predictions and targets `[n, ...]`."""
    return functional.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
