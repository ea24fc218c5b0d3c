"""The stream of records: shuffled, prefetched by one thread, and resumable at any record.

The order is a pure function of (seed, epoch): shards are permuted and cut into windows of bounded size, and the records
of a window are drawn in random order. The number of consumed records is the stream's whole state. Several processes
read the same windows and take the records in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.batch import Batch, concatenate
from stages.train.selection import SelectedSample
from stages.train.window import Memory, Window, load


class Draw(NamedTuple):
    """A draw from one window: its samples, the order of its records `[m]`, and the stream offset of the first."""

    samples: list[SelectedSample]
    order: Tensor
    position: int


def on_disk(sample: SelectedSample) -> tuple[str, int]:
    """A sort key: the order of samples in the shards."""
    return sample.row["shard"], sample.row["offset"]


class RecordStream:
    """Endless batches with each record once per epoch; a batch may span two epochs.

    Args:
        batch_size: records in each process's batch. Of every `batch_size * world_size` records, a process takes
            every `world_size`-th, starting at its `rank`.
        shuffle_bytes: size of a window's samples; two windows are in memory, the one in use and the one being read.
        skip_damaged: skip the records of damaged samples instead of raising an error.
        pin: return batches in page-locked memory, if there is a GPU.

    Attributes:
        consumed: positions of the order that all processes together have passed, including skipped records; a stream
            created with it continues exactly there, with any `world_size`.
        skipped: the number of records of each damaged sample, by the sample's name.

    Raises:
        UserError: while reading, if a sample is damaged, or all are.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: list[SelectedSample],
        batch_size: int,
        seed: int,
        shuffle_bytes: int,
        consumed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        skip_damaged: bool = False,
        pin: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle_bytes = dataset, batch_size, seed, shuffle_bytes
        self.samples = samples
        self.consumed = consumed
        self.rank, self.world_size = rank, world_size
        self.skip_damaged = skip_damaged
        self.pin = pin and torch.cuda.is_available()
        self.skipped: dict[str, int] = {}
        self.records_per_epoch = sum(sample.records for sample in self.samples)

    def __iter__(self) -> Iterator[Batch]:
        size = self.batch_size * self.world_size
        parts: list[Batch] = []
        filled = 0  # records in the batches of all processes
        for window, draw in self._windows_ahead():
            self._record_damage(window.damaged)
            places = window.intact[draw.order].nonzero().flatten()
            while len(places):
                drawn, places = places.tensor_split([size - filled])
                own = drawn[(self.rank - filled) % self.world_size :: self.world_size]
                parts.append(window.take(draw.order[own]))
                filled += len(drawn)
                if filled == size:
                    self.consumed = draw.position + int(drawn[-1]) + 1
                    batch = concatenate(parts)
                    yield batch.pin() if self.pin else batch
                    parts, filled = [], 0

    def locate_records(self, consumed: int, count: int) -> list[str]:
        """Describe the `count` records from position `consumed` on, except those of damaged samples.

        Reads the samples again to obtain the timesteps.
        """
        records = list(islice(self._records(consumed), count))
        window = load(
            self.dataset, [SelectedSample(sample.row, [number]) for sample, number in records], self.skip_damaged
        )
        return [
            f"{sample.name} record {number}: scale {sample.row['scale']:g}, timestep {timestep:g}"
            for (sample, number), timestep, intact in zip(
                records, window.records.timestep.tolist(), window.intact, strict=True
            )
            if intact
        ]

    def _record_damage(self, damaged: dict[str, int]) -> None:
        self.skipped = self.skipped | damaged
        if sum(self.skipped.values()) == self.records_per_epoch:
            raise UserError(
                f"{self.dataset.root}: every record to train on is damaged: "
                f"`python -m pipeline.verify {self.dataset.root.override('data_dir')}` lists the damage"
            )

    def _windows_ahead(self) -> Iterator[tuple[Window, Draw]]:
        """Yield each window with its draw, while the next window is read into the memory of the previous one."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            memories: Iterator[Memory] = cycle([{}, {}])
            draws = self._draws(self.consumed)
            draw = next(draws)
            reading = thread.submit(load, self.dataset, draw.samples, self.skip_damaged, next(memories))
            for next_draw in draws:
                window = reading.result()
                if next_draw.samples != draw.samples:
                    reading = thread.submit(load, self.dataset, next_draw.samples, self.skip_damaged, next(memories))
                yield window, draw
                draw = next_draw

    def _records(self, consumed: int) -> Iterator[tuple[SelectedSample, int]]:
        """Yield each record of the order as (sample, number of the record in it)."""
        for samples, order, _ in self._draws(consumed):
            numbered = [
                (sample, number)
                for sample in samples
                for number in (range(sample.records) if sample.chosen is None else sample.chosen)
            ]
            yield from (numbered[place] for place in order.tolist())

    def _draws(self, consumed: int) -> Iterator[Draw]:
        epoch, skip = divmod(consumed, self.records_per_epoch)
        while True:
            for number, samples in enumerate(self._cut(epoch)):
                count = sum(sample.records for sample in samples)
                if skip < count:
                    order = np.random.default_rng([self.seed, epoch, number]).permutation(count)
                    yield Draw(samples, torch.from_numpy(order[skip:]), consumed)
                    consumed += count - skip
                skip = max(0, skip - count)
            epoch += 1

    def _cut(self, epoch: int) -> Iterator[list[SelectedSample]]:
        """Cut an epoch's samples, shard by shard in random order, into windows of at most `shuffle_bytes`.

        Samples within a window are in the order of the disk, so that windows of the same samples are equal.
        """
        shards = sorted({sample.row["shard"] for sample in self.samples})
        place = dict(zip(shards, np.random.default_rng([self.seed, epoch]).permutation(len(shards)), strict=True))
        window: list[SelectedSample] = []
        size = 0
        for sample in sorted(self.samples, key=lambda sample: place[sample.row["shard"]]):
            if window and size + sample.row["size"] > self.shuffle_bytes:
                yield sorted(window, key=on_disk)
                window, size = [], 0
            window.append(sample)
            size += sample.row["size"]
        yield sorted(window, key=on_disk)
