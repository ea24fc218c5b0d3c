"""Windows: the samples that are in memory together, across which records are shuffled; one window for each size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from stages.base.denoiser import STEP
from stages.errors import DamageError
from stages.records.dataset import Dataset
from stages.records.schema import TensorSpec
from stages.records.trajectory import CONDITION_PREFIX, is_per_record
from stages.train.batch import Batch, as_bytes, collate, gather
from stages.train.selection import SelectedSample

Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Window:
    """All records of some samples of one size; the records of a sample share its conditions, which are stored once.

    Attributes:
        records: every per-record tensor `[m, ...]`, including the conditions that change from step to step.
        owner: `[m]`, index of each record's conditions in `cond`.
        cond: `[n, ...]`, by the names of the denoiser's arguments.
        intact: `[m]`, False for the records of damaged samples, whose content is undefined.
        damaged: the number of records of each damaged sample, by the sample's name.
    """

    records: Batch
    owner: Tensor
    cond: dict[str, Tensor]
    intact: Tensor
    damaged: dict[str, int]

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def size(self) -> str:
        return self.records.size

    def take(self, chosen: Tensor) -> Batch:
        owner = self.owner[chosen]
        records = self.records.take(chosen)
        return replace(records, cond=records.cond | {name: gather(v, owner) for name, v in self.cond.items()})


@dataclass(frozen=True)
class Windows:
    """All records of some samples, in their order, in a window for each size.

    Attributes:
        window: `[m]`, the number of each record's window; place: `[m]`, the record's index in it.
    """

    by_size: list[Window]
    window: Tensor
    place: Tensor


def load_all(
    dataset: Dataset, samples: list[SelectedSample], skip_damaged: bool, memories: dict[str, Memory]
) -> Windows:
    """Read all records of some samples of any size; `load` describes the arguments.

    Args:
        memories: by size.
    """
    sizes = list(dict.fromkeys(sample.size for sample in samples))
    counts = torch.tensor([sample.records for sample in samples])
    window = torch.tensor([sizes.index(sample.size) for sample in samples]).repeat_interleave(counts)
    place = torch.empty_like(window)
    windows = []
    for number, size in enumerate(sizes):
        own = [sample for sample in samples if sample.size == size]
        windows.append(load(dataset, own, skip_damaged, memories.setdefault(size, {})))
        place[window == number] = torch.arange(len(windows[-1]))
    return Windows(windows, window, place)


def load(
    dataset: Dataset, samples: list[SelectedSample], skip_damaged: bool = False, memory: Memory | None = None
) -> Window:
    """Read all records of some samples of one size, in their order.

    Args:
        skip_damaged: whether to continue if a sample is damaged.
        memory: buffers of an earlier window that is no longer in use; allocating memory takes longer than filling it.

    Raises:
        DamageError: a sample is damaged.
    """
    counts = torch.tensor([sample.records for sample in samples])
    specs = dataset.info.tensors_of(samples[0].row)
    fields = allocate_buffers({} if memory is None else memory, specs, int(counts.sum()))
    raw = {name: as_bytes(field) for name, field in fields.items()}
    ends = counts.cumsum(0).tolist()
    intact = torch.zeros(len(samples), dtype=torch.bool)
    conditions = []
    for i, tensors in read_samples(dataset, samples, skip_damaged):
        chosen = slice(None) if samples[i].chosen is None else samples[i].chosen
        for name, into in raw.items():
            into[ends[i] - samples[i].records : ends[i]] = as_bytes(tensors[name])[chosen]
        conditions.append(
            {k.removeprefix(CONDITION_PREFIX): v for k, v in tensors.items() if k.startswith(CONDITION_PREFIX)}
        )
        intact[i] = True
    scale = torch.tensor([sample.row["scale"] for sample in samples], dtype=torch.float32).repeat_interleave(counts)
    main = {name: fields.pop(name) for name in ("latent", "timestep", "target")}
    steps = {name: fields.pop(name) for name in list(fields) if name.startswith(STEP)}
    return Window(
        Batch(**main, scale=scale, cond=steps, guidance_stats=fields, size=samples[0].size),
        (intact.cumsum(0) - 1).repeat_interleave(counts),
        collate(conditions),
        intact.repeat_interleave(counts),
        {sample.name: sample.records for sample, whole in zip(samples, intact, strict=True) if not whole},
    )


def allocate_buffers(memory: Memory, specs: dict[str, TensorSpec], count: int) -> dict[str, Tensor]:
    """A buffer `[count, ...]` for each per-record tensor, from `memory`, which grows where it is too small."""
    for name, spec in specs.items():
        if is_per_record(name) and len(memory.get(name, ())) < count:
            memory[name] = torch.empty(count, *spec.shape, dtype=getattr(torch, spec.dtype))
    return {name: value[:count] for name, value in memory.items()}


def read_samples(
    dataset: Dataset, samples: list[SelectedSample], skip_damaged: bool
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield each sample with its index; a shard is opened once for adjacent samples."""
    tolerated = (DamageError,) if skip_damaged else ()
    for shard, places in groupby(range(len(samples)), lambda i: samples[i].row["shard"]):
        with suppress(*tolerated), dataset.open(shard) as file:
            for i in places:
                with suppress(*tolerated):
                    yield i, dataset.read(file, samples[i].row)
