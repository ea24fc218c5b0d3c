"""The stream of records: shuffled, prefetched by one thread, and resumable at any record.

The order is a pure function of (seed, epoch): shards are permuted and cut into windows of bounded size, and the records
of a window are drawn in random order. A batch holds one size. The number of consumed records, and the few among them
that wait for a full batch of their size, are the stream's whole state. Several processes read the same windows and take
the records in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.batch import Batch, concatenate
from stages.train.selection import SelectedSample
from stages.train.window import Memory, Window, Windows, load, load_all

NO_RECORDS = torch.empty(0, dtype=torch.long)


class Draw(NamedTuple):
    """A draw from one window: its samples, the order of its records `[m]`, and the stream offset of the first."""

    samples: list[SelectedSample]
    order: Tensor
    position: int

    @property
    def positions(self) -> Tensor:
        """The stream offset of each record `[m]`."""
        return torch.arange(self.position, self.position + len(self.order))

    def records(self) -> list[tuple[SelectedSample, int]]:
        """Each record of the samples, in their order, as (sample, number of the record in it)."""
        return [
            (sample, number)
            for sample in self.samples
            for number in (range(sample.records) if sample.chosen is None else sample.chosen)
        ]


def on_disk(sample: SelectedSample) -> tuple[str, int]:
    """A sort key: the order of samples in the shards."""
    return sample.row["shard"], sample.row["offset"]


class Lane:
    """The batches of one size in the making.

    Attributes:
        window: the one whose records come next; places: their indices in it `[k]`.
        positions: in the order, of these records `[k]`.
        parts: this process's records of the batch in the making.
        taken: the positions of that batch's records, those of all processes.
    """

    window: Window

    def __init__(self) -> None:
        self.parts: list[Batch] = []
        self.taken = self.positions = self.places = NO_RECORDS

    def begin(self, window: Window, places: Tensor, positions: Tensor) -> None:
        self.window, self.places, self.positions = window, places, positions

    def ends(self, size: int) -> list[int]:
        """The positions of the records that complete a batch."""
        return self.positions[size - len(self.taken) - 1 :: size].tolist()

    def take(self, count: int, rank: int, world_size: int) -> None:
        """Add the next `count` records to the batch in the making; of these, a process reads every `world_size`-th."""
        places, self.places = self.places.tensor_split([count])
        positions, self.positions = self.positions.tensor_split([count])
        if len(own := places[(rank - len(self.taken)) % world_size :: world_size]):
            self.parts.append(self.window.take(own))
        self.taken = torch.cat([self.taken, positions])

    def batch(self) -> tuple[Batch, Tensor]:
        """Return this process's batch, and the positions of all processes'; begin the next."""
        made = concatenate(self.parts), self.taken
        self.parts, self.taken = [], NO_RECORDS
        return made


class RecordStream:
    """Endless batches of one size each, with each record once per epoch; a batch may span two epochs.

    A record joins the next batch of its size, which comes when it is full. So the order of the records decides that of
    the batches.

    Args:
        batch_size: records in each process's batch. Of every `batch_size * world_size` records, a process takes
            every `world_size`-th, starting at its `rank`.
        shuffle_bytes: size of a window's samples; two windows are in memory, the one in use and the one being read.
        skip_damaged: skip the records of damaged samples instead of raising an error.
        pin: return batches in page-locked memory, if there is a GPU.

    Attributes:
        consumed: positions of the order that all processes together have passed, including skipped records.
        pending: the positions before `consumed` whose records wait for a full batch; none if there is one size. A
            stream that goes to both continues exactly there, with any `world_size`.
        drawn: the positions of the last batch's records, those of all processes.
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
        rank: int = 0,
        world_size: int = 1,
        skip_damaged: bool = False,
        pin: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle_bytes = dataset, batch_size, seed, shuffle_bytes
        self.samples = samples
        self.rank, self.world_size = rank, world_size
        self.skip_damaged = skip_damaged
        self.pin = pin and torch.cuda.is_available()
        self.drawn = NO_RECORDS
        self.skipped: dict[str, int] = {}
        self.records_per_epoch = sum(sample.records for sample in self.samples)
        self.go_to(0)

    def go_to(self, consumed: int, pending: Sequence[int] = ()) -> None:
        """Continue at a place, given by the values of these attributes there."""
        self.consumed, self._resumed = consumed, torch.tensor(pending, dtype=torch.long)
        self._lanes: dict[str, Lane] = {}

    @property
    def pending(self) -> list[int]:
        waiting = [torch.cat([lane.taken, lane.positions]) for lane in self._lanes.values()] or [self._resumed]
        positions = torch.cat(waiting)
        return sorted(positions[positions < self.consumed].tolist())

    def __iter__(self) -> Iterator[Batch]:
        self.go_to(self.consumed, self.pending)
        start = self.consumed
        for windows, draw in self._windows_ahead(start):
            positions = draw.positions
            wanted = (positions >= start) | torch.isin(positions, self._resumed)
            for number, window in enumerate(windows.by_size):
                self._record_damage(window.damaged)
                drawn = (wanted & (windows.window[draw.order] == number)).nonzero().flatten()
                places = windows.place[draw.order[drawn]]
                intact = window.intact[places]
                lane = self._lanes.setdefault(window.size, Lane())
                lane.begin(window, places[intact], positions[drawn[intact]])
            yield from self._full_batches()

    def _full_batches(self) -> Iterator[Batch]:
        """Yield the batches that the lanes' windows complete, in order; what is left begins the next ones."""
        size = self.batch_size * self.world_size
        for end, name in sorted((end, name) for name, lane in self._lanes.items() for end in lane.ends(size)):
            lane = self._lanes[name]
            lane.take(size - len(lane.taken), self.rank, self.world_size)
            batch, self.drawn = lane.batch()
            self.consumed = max(self.consumed, end + 1)
            yield batch.pin() if self.pin else batch
        for lane in self._lanes.values():
            lane.take(len(lane.positions), self.rank, self.world_size)

    def locate_records(self, positions: Tensor) -> list[str]:
        """Describe the intact records at these positions `[n]` of one size, in their order.

        Reads the samples again to obtain the timesteps.
        """
        found: dict[int, SelectedSample] = {}
        for draw in self._draws(int(positions.min())):
            if len(found) == len(positions):
                break
            records = draw.records()
            for place in torch.isin(draw.positions, positions).nonzero().flatten().tolist():
                sample, number = records[int(draw.order[place])]
                found[int(draw.positions[place])] = SelectedSample(sample.row, [number])
        chosen = [found[position] for position in positions.tolist()]
        window = load(self.dataset, chosen, self.skip_damaged)
        return [
            f"{sample.name} record {sample.chosen[0]}: scale {sample.row['scale']:g}, timestep {timestep:g}"
            for sample, timestep, intact in zip(chosen, window.records.timestep.tolist(), window.intact, strict=True)
            if intact and sample.chosen
        ]

    def _record_damage(self, damaged: dict[str, int]) -> None:
        self.skipped = self.skipped | damaged
        if sum(self.skipped.values()) == self.records_per_epoch:
            raise UserError(
                f"{self.dataset.root}: every record to train on is damaged: "
                f"`python -m pipeline.verify {self.dataset.root.override('data_dir')}` lists the damage"
            )

    def _windows_ahead(self, start: int) -> Iterator[tuple[Windows, Draw]]:
        """Yield each draw with its windows, while the next windows are read into the memory of the previous ones."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            memories: Iterator[dict[str, Memory]] = cycle([{}, {}])
            draws = self._wanted_draws(start)
            draw = next(draws)
            reading = thread.submit(load_all, self.dataset, draw.samples, self.skip_damaged, next(memories))
            for next_draw in draws:
                windows = reading.result()
                if next_draw.samples != draw.samples:
                    reading = thread.submit(
                        load_all, self.dataset, next_draw.samples, self.skip_damaged, next(memories)
                    )
                yield windows, draw
                draw = next_draw

    def _wanted_draws(self, start: int) -> Iterator[Draw]:
        """The draws from a position on, and those before it with pending records."""
        first = min([start, *self._resumed.tolist()])
        for draw in self._draws(first):
            if draw.position + len(draw.order) > start or torch.isin(self._resumed, draw.positions).any():
                yield draw

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
