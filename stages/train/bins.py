"""Means by guidance scale and by timestep: where an adapter is good and where it is not."""

from __future__ import annotations

import torch
from accelerate.utils import reduce
from torch import Tensor

SCALE_BINS, TIMESTEP_BINS = 4, 5
Range = tuple[float, float]


class BinnedMean:
    """Gathers a value of many records by scale and by timestep, on their device, which is made to wait only by `means`.

    Args:
        scale_range, timestep_range: cut into bins of equal width; what lies outside counts in the outermost.
    """

    def __init__(self, scale_range: Range, timestep_range: Range, device: str) -> None:
        ranges = {"scale": (scale_range, SCALE_BINS), "timestep": (timestep_range, TIMESTEP_BINS)}
        self.edges = {
            name: torch.linspace(low, high, bins + 1 if low < high else 2, device=device)
            for name, ((low, high), bins) in ranges.items()
        }
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        for name, edges in self.edges.items():
            self.sums[name], self.counts[name] = (torch.zeros(len(edges) - 1, device=edges.device) for _ in range(2))

    def add(self, values: Tensor, scale: Tensor, timestep: Tensor) -> None:
        """Values, scales and timesteps of n records `[n]`."""
        values = values.detach().float()
        for name, keys in (("scale", scale), ("timestep", timestep)):
            bins = torch.bucketize(keys.float(), self.edges[name][1:-1])
            self.sums[name].index_add_(0, bins, values)
            self.counts[name].index_add_(0, bins, torch.ones_like(values))

    def means(self) -> tuple[float, dict[str, float]]:
        """(over all records, by name of the bin such as `scale_1_2.5`) of all processes; then it begins anew."""
        means: dict[str, float] = {}
        mean = float("nan")
        for name, edges in self.edges.items():
            sums, counts = (values.tolist() for values in reduce([self.sums[name], self.counts[name]], "sum"))
            mean = sum(sums) / sum(counts) if sum(counts) else mean
            ends = edges.tolist()
            means |= {
                f"{name}_{low:g}_{high:g}": total / count
                for low, high, total, count in zip(ends[:-1], ends[1:], sums, counts, strict=True)
                if count
            }
        self._clear()
        return mean, means
