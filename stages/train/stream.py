"""The stream of records: shuffled, read ahead by one thread, and resumable to the record.

The order is a pure function of (seed, epoch): shards are permuted, cut into windows of a bounded size, and the records
of a window are drawn in random order. Where a run stands is one number, the records it has consumed. Several processes
read the same windows and take turns at their records.
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
    """What is drawn from one window: its samples, the order of its records `[m]`, the place of its first in the run."""

    samples: list[SelectedSample]
    order: Tensor
    position: int


def on_disk(sample: SelectedSample) -> tuple[str, int]:
    """The order of samples as they lie in the shards."""
    return sample.row["shard"], sample.row["offset"]


class RecordStream:
    """Batches without end, each record once per epoch; a batch may reach over the end of an epoch.

    Args:
        batch_size: records in each process's batch. Of every `batch_size * world_size` records, a process takes
            every `world_size`-th, from its `rank` on.
        shuffle_bytes: of the samples in a window; two windows are in memory, the one in use and the one being read.
        skip_damaged: leave out the records of damaged samples instead of ending with an error.
        pin: hand out batches in page-locked memory, where there is a GPU to copy them to.

    Attributes:
        consumed: places of the order that all processes together are past, those of records left out among them; a
            stream made with it goes on exactly there, with any `world_size`.
        skipped: the number of records of each sample that was found damaged, by its name.

    Raises:
        UserError: at reading: a sample is damaged, or all are.
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
        filled = 0  # of the batches of all processes together
        for window, draw in self._windows_ahead():
            self._note(window.damaged)
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
        """Names of the records at `count` places of the order from `consumed` on, those of damaged samples left out.

        The samples are read again, for their timesteps.
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

    def _note(self, damaged: dict[str, int]) -> None:
        self.skipped = self.skipped | damaged
        if sum(self.skipped.values()) == self.records_per_epoch:
            raise UserError(
                f"{self.dataset.root}: every record to train on is damaged: "
                f"`python -m pipeline.verify {self.dataset.root.override('data_dir')}` tells how"
            )

    def _windows_ahead(self) -> Iterator[tuple[Window, Draw]]:
        """Each window and what is drawn from it; meanwhile the next is read into the memory of the one before."""
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
        """(sample, number of the record in it) of each record of the order."""
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
        """An epoch's samples, shard by shard in random order, in windows of at most `shuffle_bytes`.

        Within a window they stand as on disk, so that windows of the same samples are equal.
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
