"""The optimizer step: AdamW, schedule, clipping, loss scaling, averaging over processes, and EMA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from stages.train.defaults import RunConfig


class Optimization:
    """Updates an adapter's weights, which stay in fp32, without synchronizing with the device.

    Attributes:
        average: the exponential moving average of the weights, with `use_ema`.
    """

    def __init__(self, adapter: nn.Module, config: RunConfig, device: str) -> None:
        self.parameters = list(adapter.parameters())
        self.config = config
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.adam_weight_decay, fused=True
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.mixed_precision == "fp16")
        self.average = EMAModel(self.parameters, decay=config.ema_decay, foreach=True) if config.use_ema else None

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def is_finite(self) -> bool:
        """Whether every weight is finite; synchronizes with the device."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all())

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one batch; a batch that is all at scale 1 bypasses the adapter and has none."""
        scaled = self.scaler.scale(loss / self.config.gradient_accumulation_steps)
        if scaled.requires_grad:
            scaled.backward()

    def step(self) -> Tensor:
        """Update the weights by the accumulated gradients, and clear these; return their norm before clipping."""
        for parameter in self.parameters:
            if parameter.grad is None:  # the loss scaler needs one, and processes must have the same number
                parameter.grad = torch.zeros_like(parameter)
        self._average_over_processes()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.parameters)
        return norm

    def _average_over_processes(self) -> None:
        """Average the gradients before unscaling, so that all processes notice the overflow of one."""
        if not torch.distributed.is_initialized():
            return
        # Every one has a gradient by now.
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, the adapter has its averaged weights, if there is an average."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state; learning rate and decays come from this run's configuration, which may have changed."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = [self.config.learning_rate] * len(self.optimizer.param_groups)
        for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["weight_decay"] = self.config.learning_rate, self.config.adam_weight_decay
            group["lr"] = self.config.learning_rate * factor(self.schedule.last_epoch)
        if state["scaler"]:  # empty without loss scaling
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.decay = self.config.ema_decay
            self.average.to(self.parameters[0].device)
