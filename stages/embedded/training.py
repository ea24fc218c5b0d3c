"""A training loop that can be stopped at any time and continues from its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_SECONDS = 300
LOGGED_STEPS = 500
WARMUP = 0.05  # share of the steps


class Training:
    """Trains what is not frozen of a model, averages its weights, and continues from its last checkpoint.

    Args:
        checkpoint: file that is written every five minutes and at the end, and read first if it exists.
        decay: of the average of the weights.

    Attributes:
        losses: mean loss of the last steps, by step.
        done: number of steps taken.
        seconds: time of these steps, of all processes that took them.
    """

    def __init__(self, model: nn.Module, checkpoint: Path, steps: int, learning_rate: float, decay: float) -> None:
        self.model, self.checkpoint, self.steps = model, checkpoint, steps
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.01)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, int(WARMUP * steps), steps)
        self.average = EMAModel(self.parameters, decay=decay, use_ema_warmup=True, power=0.75)
        self.losses: dict[int, float] = {}
        self.done, self.seconds = 0, 0.0
        if checkpoint.exists():
            self.load()

    def run(self, loss_of_batch: Callable[[], Tensor]) -> None:
        """Take the remaining steps, and put the averaged weights into the model."""
        total, counted, saved = 0.0, 0, time.monotonic()
        for _ in (bar := tqdm(range(self.done, self.steps), initial=self.done, total=self.steps, mininterval=5)):
            loss = loss_of_batch()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.average.step(self.parameters)
            self.done, total, counted = self.done + 1, total + float(loss.detach()), counted + 1
            if self.done % LOGGED_STEPS == 0:
                self.losses[self.done] = round(total / counted, 4)
                bar.set_postfix(loss=self.losses[self.done])
                total, counted = 0.0, 0
            elapsed = time.monotonic() - saved
            if elapsed > CHECKPOINT_SECONDS or self.done == self.steps:
                self.seconds += elapsed
                self.save()
                saved = time.monotonic()
        self.average.copy_to(self.parameters)
        self.model.eval()

    def save(self) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule", "average")}
        state |= {name: getattr(self, name) for name in ("losses", "done", "seconds")}
        state["parameters"] = [parameter.detach() for parameter in self.parameters]
        state["random"] = torch.get_rng_state()
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        new = self.checkpoint.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        for name in ("optimizer", "schedule", "average"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.losses, self.done, self.seconds = state["losses"], state["done"], state["seconds"]
        torch.set_rng_state(state["random"])

    def summary(self) -> dict[str, Any]:
        return {"steps": self.done, "seconds": round(self.seconds), "loss_at_step": self.losses}
