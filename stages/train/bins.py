"""Means by guidance scale, by timestep and by size, to show where an adapter is accurate."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from accelerate.utils import reduce
from torch import Tensor

from stages.train.batch import Batch

SCALE_BINS, TIMESTEP_BINS = 4, 5
Range = tuple[float, float]


class Bins(NamedTuple):
    """The ranges of scale and of timestep to cut into bins of equal width, and the sizes, each a bin if several.

    The outermost bins of a range include values outside.
    """

    scale: Range
    timestep: Range
    sizes: tuple[str, ...]

    def edges(self) -> dict[str, Tensor]:
        """The edges of the bins of each range `[bins + 1]`; a range of one value has one bin."""
        ranges = {"scale": (self.scale, SCALE_BINS), "timestep": (self.timestep, TIMESTEP_BINS)}
        return {
            name: torch.linspace(low, high, bins + 1 if low < high else 2)
            for name, ((low, high), bins) in ranges.items()
        }


class BinnedMean:
    """Accumulates a value per record in bins, on the device; only `means` synchronizes."""

    def __init__(self, bins: Bins, device: str) -> None:
        edges = bins.edges()
        self.sizes = bins.sizes
        self.names = {
            name: [f"{name}_{low:g}_{high:g}" for low, high in pairwise(values.tolist())]
            for name, values in edges.items()
        }
        if len(bins.sizes) > 1:
            self.names["size"] = [f"size_{size}" for size in bins.sizes]
        self.edges = {name: values.to(device) for name, values in edges.items()}
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.sums, self.counts = (
            {name: torch.zeros(len(bins), device=self.device) for name, bins in self.names.items()} for _ in range(2)
        )

    def add(self, values: Tensor, batch: Batch) -> None:
        """Add the values `[n]` of a batch of n records."""
        values = values.detach().float()
        for name, keys in (("scale", batch.scale), ("timestep", batch.timestep)):
            bins = torch.bucketize(keys.float(), self.edges[name][1:-1])
            self.sums[name].index_add_(0, bins, values)
            self.counts[name].index_add_(0, bins, torch.ones_like(values))
        if "size" in self.names:
            number = self.sizes.index(batch.size)
            self.sums["size"][number] += values.sum()
            self.counts["size"][number] += len(values)

    def means(self) -> tuple[float, dict[str, float]]:
        """Return the mean over all processes' records and that of each bin, by names such as `scale_1_2.5`; reset."""
        means: dict[str, float] = {}
        mean = float("nan")
        for name, bins in self.names.items():
            sums, counts = (values.tolist() for values in reduce([self.sums[name], self.counts[name]], "sum"))
            mean = sum(sums) / sum(counts) if sum(counts) else mean
            means |= {label: total / count for label, total, count in zip(bins, sums, counts, strict=True) if count}
        self._clear()
        return mean, means
