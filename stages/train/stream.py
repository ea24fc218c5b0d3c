"""The stream of records: shuffled, read ahead by one thread, and resumable to the record.

The order is a pure function of (seed, epoch): shards are permuted, cut into windows of a bounded size, and the records of
a window are drawn in random order. Where a run stands is one number, the records it has consumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.record import CONDITION_PREFIX
from stages.train.selection import Row


@dataclass(frozen=True)
class Batch:
    """`latent [n, ...]`, `timestep [n]`, `target [n, ...]`, `scale [n]`, `cond` by the denoiser's argument names `[n, ...]`."""

    latent: Tensor
    timestep: Tensor
    target: Tensor
    scale: Tensor
    cond: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, chosen: Tensor) -> Batch:
        return Batch(
            self.latent[chosen],
            self.timestep[chosen],
            self.target[chosen],
            self.scale[chosen],
            {name: value[chosen] for name, value in self.cond.items()},
        )

    def to(self, device: str, dtype: torch.dtype) -> Batch:
        """On the device, floating-point tensors but the scale in the given dtype."""
        return Batch(
            self.latent.to(device, dtype, non_blocking=True),
            self.timestep.to(device, non_blocking=True),
            self.target.to(device, torch.float32, non_blocking=True),
            self.scale.to(device, non_blocking=True),
            {
                name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
                for name, value in self.cond.items()
            },
        )


def concatenate(parts: list[Batch]) -> Batch:
    """One batch; token embeddings of several lengths are padded, as `collate` does."""
    if len(parts) == 1:
        return parts[0]
    return Batch(
        torch.cat([part.latent for part in parts]),
        torch.cat([part.timestep for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.scale for part in parts]),
        {name: torch.cat(padded([part.cond[name] for part in parts], 1)) for name in parts[0].cond},
    )


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The conditions of several samples, by name `[n, ...]`; shorter token embeddings and their masks are padded with zeros.

    Raises:
        UserError: embeddings differ in length and have no mask to tell the padding by.
    """
    collated = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if len({value.shape for value in values}) > 1 and values[0].ndim == 2 and f"{name}_mask" not in rows[0]:
            raise UserError(
                f"cond.{name} differs in length from sample to sample and has no mask: such data cannot be mixed"
            )
        collated[name] = torch.stack(padded(values, 0))
    return collated


def padded(values: list[Tensor], dim: int) -> list[Tensor]:
    """Tensors that differ in one dimension, filled up with zeros there to the longest."""
    if values[0].ndim <= dim:
        return values
    longest = max(value.shape[dim] for value in values)
    return [
        functional.pad(value, [0, 0] * (value.ndim - dim - 1) + [0, longest - value.shape[dim]]) for value in values
    ]


@dataclass(frozen=True)
class Window:
    """All records of some samples: those of each sample share its conditions, which are held once.

    Attributes:
        records: every tensor `[m, ...]`, with no conditions.
        owner: `[m]`, the sample of each record.
        cond: `[n, ...]`, by the denoiser's argument names.
    """

    records: Batch
    owner: Tensor
    cond: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.owner)

    def take(self, chosen: Tensor) -> Batch:
        part, owner = self.records.take(chosen), self.owner[chosen]
        return replace(part, cond={name: value[owner] for name, value in self.cond.items()})


def chosen_records(sample: dict[str, Tensor], chosen: list[int] | None) -> dict[str, Tensor]:
    """A sample with only some of its records; all by default."""
    if chosen is None:
        return sample
    return {name: value if name.startswith(CONDITION_PREFIX) else value[chosen] for name, value in sample.items()}


def load(dataset: Dataset, rows: list[Row]) -> Window:
    """All records of some samples, in their order; each shard is opened once."""
    samples: list[dict[str, Tensor]] = [{}] * len(rows)
    for shard in sorted({row["shard"] for row in rows}):
        with (dataset.root / shard).open("rb") as file:
            for i, row in enumerate(rows):
                if row["shard"] == shard:
                    samples[i] = chosen_records(dataset.read(file, row), row.get("chosen"))
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([row["records"] for row in rows]))
    records = Batch(
        torch.cat([sample["latent"] for sample in samples]),
        torch.cat([sample["timestep"] for sample in samples]),
        torch.cat([sample["target"] for sample in samples]),
        torch.tensor([row["scale"] for row in rows], dtype=torch.float32)[owner],
        {},
    )
    conditions = [
        {k.removeprefix(CONDITION_PREFIX): v for k, v in sample.items() if k.startswith(CONDITION_PREFIX)}
        for sample in samples
    ]
    return Window(records, owner, collate(conditions))


class RecordStream:
    """Batches without end, each record once per epoch; a batch may reach over the end of an epoch.

    Attributes:
        consumed: records handed out so far; a stream made with it goes on exactly there.
    """

    def __init__(
        self, dataset: Dataset, rows: list[Row], batch_size: int, seed: int, shuffle_bytes: int, consumed: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle_bytes = dataset, batch_size, seed, shuffle_bytes
        self.rows = rows
        self.consumed = consumed
        self.records_per_epoch = sum(row["records"] for row in self.rows)

    def __iter__(self) -> Iterator[Batch]:
        parts: list[Batch] = []
        missing = self.batch_size
        for records, order in self._windows_ahead():
            while len(order):
                parts.append(records.take(order[:missing]))
                order, missing = order[missing:], missing - len(parts[-1])
                if not missing:
                    self.consumed += self.batch_size
                    yield concatenate(parts)
                    parts, missing = [], self.batch_size

    def _windows_ahead(self) -> Iterator[tuple[Window, Tensor]]:
        """Each window's records and what is left of their order; the next window is read while one is in use."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            windows = self._windows()
            rows, order = next(windows)
            reading = thread.submit(load, self.dataset, rows)
            for next_rows, next_order in windows:
                records = reading.result()
                reading = thread.submit(load, self.dataset, next_rows)
                yield records, order
                order = next_order

    def _windows(self) -> Iterator[tuple[list[Row], Tensor]]:
        epoch, skip = divmod(self.consumed, self.records_per_epoch)
        while True:
            for number, rows in enumerate(self._cut(epoch)):
                count = sum(row["records"] for row in rows)
                if skip < count:
                    order = np.random.default_rng([self.seed, epoch, number]).permutation(count)
                    yield rows, torch.from_numpy(order[skip:])
                skip = max(0, skip - count)
            epoch += 1

    def _cut(self, epoch: int) -> Iterator[list[Row]]:
        """An epoch's samples, shard by shard in random order, in windows of at most `shuffle_bytes`."""
        shards = sorted({row["shard"] for row in self.rows})
        place = dict(zip(shards, np.random.default_rng([self.seed, epoch]).permutation(len(shards)), strict=True))
        window: list[Row] = []
        size = 0
        for row in sorted(self.rows, key=lambda row: place[row["shard"]]):
            if window and size + row["size"] > self.shuffle_bytes:
                yield window
                window, size = [], 0
            window.append(row)
            size += row["size"]
        yield window
