from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.train
from stages.adapters import GuidanceAdapter
from stages.errors import UserError
from stages.train import processes
from stages.train.best import BEST, weights_of
from stages.train.decoding import Decoder
from stages.train.sampling import HeldOutSampling
from stages.train.trainer import Trainer
from tests.conftest import train_config


def test_the_adapter_of_the_best_validation_is_kept_beside_the_last(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = Trainer(train_config(shared_dataset, tmp_path, validation_steps=4)), {}
    losses = iter([0.9, 0.3, 0.2, float("nan"), 0.5])  # the first is without guidance

    def measure(*_: object, **__: object) -> tuple[float, dict[str, float]]:
        seen[trainer.step] = weights_of(trainer.adapter)
        return next(losses), {}

    monkeypatch.setattr(trainer.validation.losses, "measure", measure)
    trainer.config.max_train_steps = 16
    summary = trainer.run()
    assert summary["best"] == {"folder": BEST, "step": 8, "validation_loss": 0.2}
    best, last = (GuidanceAdapter.from_pretrained(folder) for folder in (tmp_path / BEST, tmp_path))
    assert all(torch.equal(value, seen[8][name]) for name, value in best.state_dict().items())
    assert all(torch.equal(value, seen[16][name]) for name, value in last.state_dict().items())
    assert best.metadata.training["steps"] == 8
    assert best.metadata.guidance_gain == (1 - 0.2 / 0.9) ** -0.5
    assert trainer.adapter.metadata.guidance_gain == 1.0  # explains less than half
    assert json.loads((tmp_path / BEST / "adapter_config.json").read_text())["training"]["validation_loss"] == 0.2


def test_training_goes_on_from_its_own_weights(shared_dataset: Path, tmp_path: Path) -> None:
    ends = []
    for name, every in (("often", 1), ("at the end", 100)):
        trainer = Trainer(train_config(shared_dataset, tmp_path / name, validation_steps=every))
        trainer.run()
        ends.append(weights_of(trainer.adapter))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_longer_run_keeps_the_best_adapter_of_the_run_before(
    shared_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Trainer(train_config(shared_dataset, tmp_path)).run()["best"]
    assert before["step"] == 12
    longer = train_config(shared_dataset, tmp_path, max_train_steps=14, resume_from_checkpoint="latest")
    pipeline.train.main(replace(longer, learning_rate=1.0, lr_scheduler="constant"))
    assert json.loads((tmp_path / "training.json").read_text())["best"] == before
    told = f"; the lowest was {before['validation_loss']:.5f} after 12 steps, in {tmp_path / BEST}"
    assert capsys.readouterr().out.splitlines()[-1].endswith(told)
    assert GuidanceAdapter.from_pretrained(tmp_path / BEST).metadata.training["steps"] == 12


def test_each_size_is_tried_before_the_first_step_and_all_processes_learn_of_a_refusal(
    shared_dataset: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(
        HeldOutSampling, "sizes", property(lambda self: [f"{i % 2}" for i in range(len(self.held_out))])
    )
    monkeypatch.setattr(Decoder, "try_out", lambda self, size, latents: tried.append(size))
    Trainer(train_config(shared_dataset, tmp_path / "run", vae_name_or_path=str(tiny_teacher)))
    assert tried == ["0", "1"]
    sent: list[Any] = []
    monkeypatch.setattr(processes, "broadcast_object_list", lambda outcome: sent.extend(outcome) or outcome)
    with pytest.raises(UserError, match="vae_name_or_path=.*nowhere: no VAE could be loaded from it"):
        Trainer(train_config(shared_dataset, tmp_path / "other", vae_name_or_path=str(tmp_path / "nowhere")))
    assert "nowhere: no VAE" in str(sent[-1][1])
