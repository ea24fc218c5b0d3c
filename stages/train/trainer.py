"""The trainer: one loop from records to an adapter's folder."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from stages.adapters.folder import CONFIG_FILE
from stages.base import choose_device
from stages.config import check_bounds
from stages.errors import UserError
from stages.progress import progress
from stages.records.dataset import Dataset
from stages.train.checkpoint import load_checkpoint, save_checkpoint
from stages.train.config import KEPT_WHEN_RESUMED, TrainConfig
from stages.train.objective import Objective, squared_error
from stages.train.selection import select
from stages.train.stream import Batch, RecordStream, load
from stages.train.student import Student

VALIDATION_SAMPLES_AT_ONCE = 32


class Trainer:
    """One training run.

    Raises:
        UserError: the dataset cannot be read, does not fit the base, or the folder holds another run.
    """

    def __init__(self, config: TrainConfig) -> None:
        check_bounds(config)
        self.config = config
        self.root = Path(config.output_dir)
        self.checkpoints = self.root / "checkpoints"
        if config.resume_from_checkpoint is None and any(
            p.exists() for p in (self.root / CONFIG_FILE, self.checkpoints)
        ):
            raise UserError(
                f"{self.root}: holds an earlier run: take another output_dir, or resume_from_checkpoint=latest"
            )
        self.dataset = Dataset(config.data_dir)
        training, self.validation_rows = select(self.dataset, config)
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.student = Student.create(
            self.dataset, config.adapter, config.pretrained_model_name_or_path, self.device, config.scale_range
        )
        self.adapter = self.student.adapter
        self.objective = Objective(config.loss, self.dataset.info["teacher"], self.device)
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay, fused=True
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.stream = RecordStream(self.dataset, training, config.train_batch_size, config.seed, config.shuffle_bytes)
        self.step, self.loss = 0, float("nan")
        if config.resume_from_checkpoint is not None:
            self.restore(load_checkpoint(self.checkpoints, config.resume_from_checkpoint))

    @property
    def adapter_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.adapter.parameters())

    @property
    def adapter_share(self) -> float:
        """The adapter's parameters as a share of the base's."""
        return self.adapter_parameters / sum(parameter.numel() for parameter in self.student.denoiser.parameters())

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had never stopped."""
        return {
            "step": self.step,
            "loss": self.loss,
            "adapter": self.adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "records_consumed": self.stream.consumed,
            "dataset_fingerprint": self.dataset.fingerprint,
            "config": {key: asdict(self.config)[key] for key in KEPT_WHEN_RESUMED},
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["dataset_fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"{self.dataset.root}: not the dataset of the checkpoint: fingerprint {self.dataset.fingerprint[:12]}, "
                f"the checkpoint has {state['dataset_fingerprint'][:12]}"
            )
        now = asdict(self.config)
        for key, before in state["config"].items():
            if now[key] != before:
                raise UserError(
                    f"{key}={now[key]}: the checkpoint's run had {before}: resume with that, or begin a new run"
                )
        if state["step"] > self.config.max_train_steps:
            raise UserError(
                f"max_train_steps={self.config.max_train_steps}: the checkpoint is already at step {state['step']}"
            )
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        self.stream.consumed = state["records_consumed"]
        self.step, self.loss = state["step"], state["loss"]

    def run(self) -> dict[str, Any]:
        """Train to the end, write the adapter's folder, and tell the content of `training.json`."""
        start, first_step = time.monotonic(), self.step
        unguided_loss = self.validate(untrained=True)
        with self._log() as log:
            self._fit(log)
            validation_loss = self.validate()
            log("validation_loss", validation_loss, self.step)
        seconds = time.monotonic() - start
        summary = {
            "steps": self.step,
            "loss": self.loss,
            "validation_loss": validation_loss,
            "validation_loss_unguided": unguided_loss,
            "adapter_parameters": self.adapter_parameters,
            "adapter_share": self.adapter_share,
            "seconds": seconds,
            "records_per_second": (self.step - first_step) * self.config.train_batch_size / seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        told = ("steps", "validation_loss", "validation_loss_unguided")
        self.adapter.about["training"] = self.dataset.info["counts"] | {key: summary[key] for key in told}
        self.adapter.save_pretrained(self.root)
        return summary

    def _fit(self, log: Callable[[str, float, int], None]) -> None:
        config, losses = self.config, []
        batches = iter(self.stream)
        with progress(config.max_train_steps, "train", "steps", initial=self.step) as bar:
            while self.step < config.max_train_steps:
                losses.append(self.train_step(next(batches)))
                self.step += 1
                bar.update()
                last = self.step == config.max_train_steps
                saving = self.step % config.checkpointing_steps == 0 or last
                if self.step % config.logging_steps == 0 or saving:
                    self.loss = self._mean(losses)
                    losses.clear()
                    log("loss", self.loss, self.step)
                    log("learning_rate", self.schedule.get_last_lr()[0], self.step)
                    bar.set_postfix(loss=f"{self.loss:.5f}", refresh=False)
                if self.step % config.validation_steps == 0 and not last:
                    log("validation_loss", self.validate(), self.step)
                if saving:
                    save_checkpoint(self.checkpoints, self.step, self.state(), config.checkpoints_total_limit)

    def train_step(self, batch: Batch) -> Tensor:
        """One optimizer step; the loss stays on the device, so that the device is not made to wait."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = batch.to(self.device, self.student.dtype)
        loss = self.objective(self._predict(batch), batch.target, batch.timestep).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _predict(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.mixed_precision == "bf16"):
            return self.student.predict(batch)

    @torch.no_grad()
    def validate(self, untrained: bool = False) -> float:
        """The mean squared error over held-out trajectories, whatever the loss; untrained, that of the base without guidance."""
        rows = self.validation_rows
        total, count = 0.0, 0
        for start in range(0, len(rows), VALIDATION_SAMPLES_AT_ONCE):
            window = load(self.dataset, rows[start : start + VALIDATION_SAMPLES_AT_ONCE])
            for chosen in torch.arange(len(window)).split(self.config.train_batch_size):
                batch = window.take(chosen).to(self.device, self.student.dtype)
                if untrained:
                    batch = replace(batch, scale=torch.ones(len(batch)))
                total += float(squared_error(self._predict(batch), batch.target).sum())
            count += len(window)
        return total / count

    def _mean(self, losses: list[Tensor]) -> float:
        loss = float(torch.stack(losses).mean())
        if loss != loss:
            raise UserError(
                f"step {self.step}: the loss is not a number: lower learning_rate={self.config.learning_rate:g}; "
                f"the checkpoints in {self.checkpoints} are from before"
            )
        return loss

    @contextmanager
    def _log(self) -> Iterator[Callable[[str, float, int], None]]:
        if self.config.report_to == "none":
            yield lambda *_: None
            return
        with SummaryWriter(str(self.root / "logs"), purge_step=self.step) as writer:
            yield writer.add_scalar


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's memory where there is one, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
