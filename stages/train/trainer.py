"""The trainer: from a dataset's records to an adapter's folder."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from tqdm import tqdm

from stages.adapters import GuidanceAdapter
from stages.adapters.folder import CONFIG_FILE
from stages.base.loading import choose_device
from stages.configuration.options import check_bounds
from stages.errors import UserError
from stages.progress import progress
from stages.records.dataset import Dataset
from stages.records.plans import snapshots
from stages.storage.cache import ShardCache
from stages.storage.files import check_folder
from stages.storage.folder import open_folder
from stages.storage.locks import exclusive_lock
from stages.train.base import computing_dtype, load_base, parameters_of
from stages.train.batch import Batch
from stages.train.bins import Bins
from stages.train.checkpoint import (
    CHECKPOINTS,
    check_resumable,
    check_room,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from stages.train.compatibility import check_split, check_together
from stages.train.compiling import compile_errors
from stages.train.config import TrainConfig, effective
from stages.train.defaults import RunConfig, complete, describe_course
from stages.train.foresight import foresee
from stages.train.objective import Objective
from stages.train.optimization import Optimization
from stages.train.processes import from_main, join_processes
from stages.train.quantization import check_quantization
from stages.train.selection import SelectedSample, choose_denoiser, remarks, select, trained_scales
from stages.train.sharding import is_asked
from stages.train.stream import RecordStream
from stages.train.student import Student
from stages.train.telemetry import BatchPosition, Meter, Trackers, tracker_class
from stages.train.vae_folder import check_vae
from stages.train.validation import Validation

NAMED_RECORDS = 5


class Trainer:
    """One training run, or one process of it under `accelerate launch`.

    Cheap checks come before the base is loaded.

    Raises:
        UserError: the dataset cannot be read or does not fit the base, or the folder holds another run, lacks space, or
            cannot be written.
    """

    def __init__(self, given: TrainConfig, dry_run: bool = False) -> None:
        """
        Args:
            dry_run: only check and foresee, also for another machine than this one; the trainer cannot run.
        """
        check(given)
        if dry_run:
            given = replace(given, cache_dir=None)  # it would be written
        self.root = Path(given.output_dir)
        self.checkpoints = self.root / "checkpoints"
        device = choose_device("auto" if dry_run else given.device)
        self.processes = join_processes(device)
        several = device == "cuda" and self.processes.num_processes > 1
        self.device = f"cuda:{self.processes.local_process_index}" if several else device
        state = from_main(lambda: self._load_state(given))
        self.dataset = self._open_dataset(given, None if state is None else state["dataset_fingerprint"])
        training, held_out = select(self.dataset, given)
        self.config = self._complete(given, training, held_out)
        if state is not None:
            check_resumable(state, self.dataset, self.config)
        if is_asked():
            check_split(self.config)
        self.objective = Objective(self.config.loss, self.dataset.info.teacher, self.device)
        scales, name = trained_scales(training, self.config), choose_denoiser(self.dataset, self.config)
        if not dry_run:
            self.check_machine()
        if (vae := self.config.vae_name_or_path) is not None:
            from_main(lambda: check_vae(vae, self.dataset))
        predict = dry_run or self.device.startswith("cuda")
        self.foresight = from_main(lambda: foresee(self.dataset, self.config, name, scales, predict))
        if not dry_run:
            from_main(lambda: check_folder(self.root))  # after the checks that need no folder
            torch.manual_seed(self.config.seed)
            self.student = self._new_student(name, scales)
            self._prepare(training, held_out, state)

    def _complete(
        self, given: TrainConfig, training: list[SelectedSample], held_out: list[SelectedSample]
    ) -> RunConfig:
        """The configuration with all choices made; `remarks` tell them."""
        records = sum(sample.records for sample in training)
        config = complete(given, records, self.processes.num_processes)
        self.remarks = describe_course(config, records, self.processes.num_processes)
        self.remarks += remarks(self.dataset, held_out, config)
        return config

    def check_machine(self) -> None:
        """Check that this machine can hold the base as the options ask.

        Raises:
            UserError: a library is not installed, or this device cannot.
        """
        choose_device(self.config.device)
        dtype = computing_dtype(self.dataset, self.config.mixed_precision)
        check_quantization(self.config.quantization, self.device, dtype)

    def _prepare(
        self, training: list[SelectedSample], held_out: list[SelectedSample], state: dict[str, Any] | None
    ) -> None:
        """Make the parts of the run around its student, and restore a state."""
        config, skipping = self.config, self.config.on_damage == "skip"
        self.adapter = self.student.adapter
        self.optimization = Optimization(self.adapter, config, self.device)
        self.stream = RecordStream(
            self.dataset, training, config.train_batch_size, config.seed, config.shuffle_bytes,
            rank=self.processes.process_index, world_size=self.processes.num_processes, skip_damaged=skipping,
            pin=self.device.startswith("cuda"),
        )  # fmt: skip
        bins = bins_of(self.dataset, self.adapter.metadata.scale_range)
        self.meter = Meter(bins, self.device)
        self.validation = Validation(self.dataset, training, held_out, config, self.student, bins, self.device)
        self.remarks += self.validation.remarks
        self.step = 0
        self.loss = math.nan
        if state is not None:
            self.restore(state)
        from_main(lambda: check_room(self.checkpoints, self._size_of_state(), self._additional_checkpoints()))

    def _size_of_state(self) -> int:
        """Bytes of a checkpoint: the weights, two moments of each, the best ones, and the average if there is one."""
        each = sum(parameter.numel() * parameter.element_size() for parameter in self.adapter.parameters())
        return each * (5 if self.config.use_ema else 4)

    def _additional_checkpoints(self) -> int:
        """How many checkpoints the run adds at most, since each is written before the oldest is removed."""
        config, existing = self.config, len(list(self.checkpoints.glob(CHECKPOINTS)))
        left = math.ceil((config.max_train_steps - self.step) / config.checkpointing_steps)
        return min(left, max(1, config.checkpoints_total_limit + 1 - existing))

    def _load_state(self, config: TrainConfig) -> dict[str, Any] | None:
        """The state to resume from; None for a new run."""
        path = find_checkpoint(self.checkpoints, config.resume_from_checkpoint)
        if path is not None:
            return load_checkpoint(path)
        if find_checkpoint(self.checkpoints, "latest"):
            raise UserError(
                f"{self.root}: holds an earlier run: take another output_dir, or resume_from_checkpoint=latest"
            )
        if (self.root / CONFIG_FILE).exists():
            raise UserError(f"{self.root}: holds an adapter, and no checkpoint to resume from: take another output_dir")
        return None

    def _open_dataset(self, config: TrainConfig, fingerprint: str | None) -> Dataset:
        """Open the checkpoint's snapshot if it exists, else the newest.

        The main process decides for all, because the dataset may grow between two processes' reads.
        """
        cache = None if config.cache_dir is None else ShardCache(Path(config.cache_dir), config.cache_bytes)

        def choose() -> tuple[str | None, str]:
            root = open_folder(config.data_dir)  # on the hub, at the commit that a branch names now
            available = snapshots(root)
            return fingerprint if fingerprint in available else next(reversed(available), None), str(root)

        snapshot, place = from_main(choose)
        return Dataset(place, snapshot, check_sizes=config.on_damage != "skip", cache=cache)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the run's folder; a killed run releases the lock.

        Raises:
            UserError: another run is training in the folder.
        """
        with ExitStack() as stack:
            from_main(lambda: stack.enter_context(exclusive_lock(self.root, "another run is training")))
            yield

    def _new_student(self, name: str, scale_range: list[float] | None) -> Student:
        config, split = self.config, is_asked()
        denoiser = load_base(
            self.dataset,
            config.pretrained_model_name_or_path,
            "cpu" if split else self.device,
            config.mixed_precision,
            config.quantization,
            name,
            config.enable_group_offload,
        )
        student = Student.create(self.dataset, config.adapter, denoiser, scale_range, config.mixed_precision, name)
        if split:
            student.shard(self.device)
        if config.gradient_checkpointing:
            student.checkpoint_gradients()
        if config.torch_compile:
            with compile_errors():
                student.compile()
        if self.device.startswith("cuda"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        return student

    @property
    def adapter_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.adapter.parameters())

    @property
    def adapter_share(self) -> float:
        """The adapter's parameters as a share of the base's."""
        return self.adapter_parameters / parameters_of(self.student.denoiser)

    def state(self) -> dict[str, Any]:
        """The complete state of the run: a resumed run continues as if it had never stopped."""
        return {
            "step": self.step,
            "seconds": self.meter.seconds,
            "loss": self.loss,
            **self.validation.state(),
            "adapter": self.adapter.state_dict(),
            "optimization": self.optimization.state(),
            "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            "records_consumed": self.stream.consumed,
            "records_pending": self.stream.pending,
            "skipped": self.stream.skipped,
            "dataset_fingerprint": self.dataset.fingerprint,
            "data_dir": str(self.dataset.root),
            "config": effective(self.config),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that passed `check_resumable`."""
        self.adapter.load_state_dict(state["adapter"])
        self.optimization.restore(state["optimization"])
        torch.set_rng_state(state["rng"][0])
        if len(state["rng"]) == 1 + torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"][1:])
        self.stream.go_to(state["records_consumed"], state["records_pending"])
        self.stream.skipped = state["skipped"]
        self.step, self.meter.seconds = state["step"], state["seconds"]
        self.loss = state["loss"]
        self.validation.restore(state)

    def run(self) -> dict[str, Any]:
        """Train to the end, write the adapter's folder, and return the content of `training.json`.

        Raises:
            UserError: a loss or a weight is not finite, or compilation failed.
        """
        with compile_errors(self.config.torch_compile):  # torch compiles each kind of pass on first use
            return self._run()

    def _run(self) -> dict[str, Any]:
        if self.step == 0:
            self.validation.begin()
        self.validation.save_best()  # an interrupted run may have left a later one, which this run need not reach
        settings = {key: value for key, value in asdict(self.config).items() if isinstance(value, (str, int, float))}
        with Trackers(self.config.report_to, self.root, self.step, settings) as trackers:
            self._fit(trackers)
            self._validate(trackers)
            if self.validation.best is not None and self.validation.best.step == self.step:
                self._save()  # again, so that a longer run knows the best adapter
        if not math.isfinite(self.validation.loss):
            raise UserError(f"step {self.step}: the validation loss is not finite: {self._way_out}")
        skipped = self.stream.skipped | self.validation.losses.skipped
        summary = {
            "steps": self.step,
            "loss": self.loss,
            **self.validation.figures(),
            "adapter_parameters": self.adapter_parameters,
            "adapter_share": self.adapter_share,
            "seconds": self.meter.seconds,
            "records_per_second": self.stream.consumed / self.meter.seconds,
            "records_skipped": sum(skipped.values()),
            "samples_skipped": sorted(skipped),
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.adapter.metadata = self.validation.metadata(self.step, self.validation.loss)
        if self.processes.is_main_process:
            with self.optimization.averaged():
                self.adapter.save_pretrained(self.root)
        return summary

    def _fit(self, trackers: Trackers) -> None:
        config, batches = self.config, iter(self.stream)
        shown = self.processes.is_main_process
        with progress(config.max_train_steps, "train", "steps", self.step, shown) as bar:
            while self.step < config.max_train_steps:
                with self.meter.working():
                    self.train_step(batches)
                bar.update()
                last = self.step == config.max_train_steps
                saving = self.step % config.checkpointing_steps == 0 or last
                if self.step % config.logging_steps == 0 or saving:
                    self._report(trackers, bar)
                if self.step % config.validation_steps == 0 and not last:
                    self._validate(trackers)
                if saving:
                    self._save()

    def _save(self) -> None:
        if self.processes.is_main_process:
            save_checkpoint(self.checkpoints, self.step, self.state(), self.config.checkpoints_total_limit)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Run one optimizer step; measurements stay on the device, so that nothing synchronizes."""
        for _ in range(self.config.gradient_accumulation_steps):
            with self.meter.waiting():
                batch = next(batches).to(self.device, self.student.dtype)
            losses = self.objective(self.student.predict(batch), batch)
            self.optimization.backward(losses.mean())
            self.meter.add(losses.detach(), batch, BatchPosition(self.step + 1, self.stream.drawn))
        self.meter.norms.append(self.optimization.step())
        self.step += 1

    def _report(self, trackers: Trackers, bar: tqdm[Any]) -> None:
        """
        Raises:
            UserError: a loss since the last report, or a weight, is not finite; no checkpoint was written since.
        """
        if (found := self.meter.not_finite()) is not None:
            raise UserError(self._locate_failure(*found))
        if not self.optimization.is_finite():
            raise UserError(f"step {self.step}: the weights are no longer finite: {self._way_out}")
        scalars = self.meter.read()
        self.loss = scalars["loss"]
        scalars |= {"learning_rate": self.optimization.learning_rate, "peak_memory_bytes": peak_memory(self.device)}
        trackers.log(scalars, self.step)
        bar.set_postfix_str(f"loss {self.loss:.5f}, {scalars['records_per_second']:.0f} records/s", refresh=False)

    def _locate_failure(self, position: BatchPosition, wrong: list[int]) -> str:
        names = self.stream.locate_records(position.positions)[self.stream.rank :: self.stream.world_size]
        named = "; ".join(names[i] for i in wrong[:NAMED_RECORDS])
        more = f"; and {len(wrong) - NAMED_RECORDS} more of its batch" if len(wrong) > NAMED_RECORDS else ""
        return f"step {position.step}: the loss is not finite at {named}{more}: {self._way_out}"

    @property
    def _way_out(self) -> str:
        return f"lower learning_rate={self.config.learning_rate:g}; the checkpoints in {self.checkpoints} are older"

    def _validate(self, trackers: Trackers) -> None:
        with self.optimization.averaged():
            self.validation.measure(self.step, trackers)


def check(config: TrainConfig) -> None:
    """Check the options, before anything is read.

    Raises:
        UserError: an option is invalid; names it.
    """
    check_bounds(config)
    check_together(config)
    tracker_class(config.report_to)
    GuidanceAdapter.get_class(config.adapter.variant)


def bins_of(dataset: Dataset, scale_range: list[float]) -> Bins:
    """The bins of a run's records."""
    low, high = (pc.min_max(dataset.manifest[f"timestep_{end}"]).as_py()[end] for end in ("min", "max"))
    return Bins((scale_range[0], scale_range[1]), (low, high), tuple(dataset.info.sizes))


def peak_memory(device: str) -> int:
    """Peak memory in bytes: of the GPU, or of this process on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
