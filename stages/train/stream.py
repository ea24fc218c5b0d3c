"""The stream of records: shuffled, read ahead by one thread, and resumable to the record.

The order is a pure function of (seed, epoch): shards are permuted, cut into windows of a bounded size, and the records of
a window are drawn in random order. Where a run stands is one number, the records it has consumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stages.records.dataset import Dataset
from stages.records.record import CONDITION_PREFIX


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
    if len(parts) == 1:
        return parts[0]
    return Batch(
        torch.cat([part.latent for part in parts]),
        torch.cat([part.timestep for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.scale for part in parts]),
        {name: torch.cat([part.cond[name] for part in parts]) for name in parts[0].cond},
    )


def hold_out(manifest: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """(training, validation): whole trajectories are held out, because the records of one resemble each other."""
    trajectories = np.unique(manifest["trajectory"].to_numpy())
    count = max(1, round(share * len(trajectories)))
    chosen = np.random.default_rng([seed, 1]).permutation(trajectories)[:count]
    held = np.isin(manifest["trajectory"].to_numpy(), chosen)
    return manifest.filter(pa.array(~held)), manifest.filter(pa.array(held))


def load(dataset: Dataset, rows: list[dict[str, Any]]) -> Batch:
    """All records of some samples, in their order; each shard is opened once."""
    samples: list[dict[str, Tensor]] = [{}] * len(rows)
    for shard in sorted({row["shard"] for row in rows}):
        with (dataset.root / shard).open("rb") as file:
            for i, row in enumerate(rows):
                if row["shard"] == shard:
                    samples[i] = dataset.read(file, row)
    counts = torch.tensor([row["records"] for row in rows])
    scales = torch.tensor([row["scale"] for row in rows], dtype=torch.float32)
    names = [name for name in samples[0] if name.startswith(CONDITION_PREFIX)]
    return Batch(
        torch.cat([sample["latent"] for sample in samples]),
        torch.cat([sample["timestep"] for sample in samples]),
        torch.cat([sample["target"] for sample in samples]),
        scales.repeat_interleave(counts),
        {
            name.removeprefix(CONDITION_PREFIX): torch.stack([s[name] for s in samples]).repeat_interleave(counts, 0)
            for name in names
        },
    )


class RecordStream:
    """Batches without end, each record once per epoch; a batch may reach over the end of an epoch.

    Attributes:
        consumed: records handed out so far; a stream made with it goes on exactly there.
    """

    def __init__(
        self, dataset: Dataset, rows: pa.Table, batch_size: int, seed: int, shuffle_bytes: int, consumed: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle_bytes = dataset, batch_size, seed, shuffle_bytes
        self.rows = rows.to_pylist()
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

    def _windows_ahead(self) -> Iterator[tuple[Batch, Tensor]]:
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

    def _windows(self) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
        epoch, skip = divmod(self.consumed, self.records_per_epoch)
        while True:
            for number, rows in enumerate(self._cut(epoch)):
                count = sum(row["records"] for row in rows)
                if skip < count:
                    order = np.random.default_rng([self.seed, epoch, number]).permutation(count)
                    yield rows, torch.from_numpy(order[skip:])
                skip = max(0, skip - count)
            epoch += 1

    def _cut(self, epoch: int) -> Iterator[list[dict[str, Any]]]:
        """An epoch's samples, shard by shard in random order, in windows of at most `shuffle_bytes`."""
        shards = sorted({row["shard"] for row in self.rows})
        place = dict(zip(shards, np.random.default_rng([self.seed, epoch]).permutation(len(shards)), strict=True))
        window: list[dict[str, Any]] = []
        size = 0
        for row in sorted(self.rows, key=lambda row: place[row["shard"]]):
            if window and size + row["size"] > self.shuffle_bytes:
                yield window
                window, size = [], 0
            window.append(row)
            size += row["size"]
        yield window
