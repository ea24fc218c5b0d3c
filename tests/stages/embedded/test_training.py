"""A training that was stopped continues as if it had not been."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.embedded.training import Training

STEPS = 6


class StoppedError(Exception):
    """Stands for the end of the process."""


def train(checkpoint: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    training = Training(model, checkpoint, STEPS, learning_rate=0.1, decay=0.9)

    def loss_of_batch() -> Tensor:
        if training.done == stop_at:
            training.save()
            raise StoppedError
        return model(torch.randn(8, 4)).square().mean()

    training.run(loss_of_batch)
    return model.state_dict()


def test_a_stopped_training_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "undisturbed.pt")
    with pytest.raises(StoppedError):
        train(tmp_path / "stopped.pt", stop_at=3)
    continued = train(tmp_path / "stopped.pt")
    assert all(torch.equal(continued[name], undisturbed[name]) for name in undisturbed)


def test_a_finished_training_takes_no_further_step(tmp_path: Path) -> None:
    first = train(tmp_path / "checkpoint.pt")
    again = train(tmp_path / "checkpoint.pt", stop_at=STEPS)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_rate_follows_the_steps_that_are_asked_for(tmp_path: Path) -> None:
    """A training of 100 steps ends at a rate of 0; continued to 200, it is near the middle of a cosine."""
    model = nn.Linear(4, 1)
    first = Training(model, tmp_path / "checkpoint.pt", 100, learning_rate=0.1, decay=0.9)
    first.run(lambda: model(torch.ones(1, 4)).square().mean())
    assert first.schedule.get_last_lr() == [pytest.approx(0)]
    longer = Training(model, tmp_path / "checkpoint.pt", 200, learning_rate=0.1, decay=0.9)
    longer.schedule.step()
    assert longer.schedule.get_last_lr() == [pytest.approx(0.05 + 0.05 * math.cos(math.pi * 91 / 190))]
