from __future__ import annotations

import math

import torch

from stages.base.size import DEFAULT_SIZE
from stages.train.batch import Batch
from stages.train.bins import BinnedMean, Bins


def batch(scale: list[float], timestep: list[float], size: str = DEFAULT_SIZE) -> Batch:
    latent = torch.zeros(len(scale), 1)
    return Batch(latent, torch.tensor(timestep), latent, torch.tensor(scale), {}, size=size)


def test_means_are_computed_per_bin_and_reset() -> None:
    bins = BinnedMean(Bins((1.0, 5.0), (0.0, 1000.0), (DEFAULT_SIZE,)), "cpu")
    bins.add(torch.tensor([1.0, 3.0, 10.0]), batch([1.0, 1.5, 9.0], [0, 999, 950]))
    bins.add(torch.tensor([20.0]), batch([4.5], [1000]))
    mean, by_bin = bins.means()
    assert mean == 8.5
    assert by_bin == {"scale_1_2": 2.0, "scale_4_5": 15.0, "timestep_0_200": 1.0, "timestep_800_1000": 11.0}
    mean, by_bin = bins.means()
    assert math.isnan(mean)
    assert by_bin == {}


def test_a_single_scale_is_one_bin() -> None:
    bins = BinnedMean(Bins((2.0, 2.0), (0.0, 1.0), (DEFAULT_SIZE,)), "cpu")
    bins.add(torch.ones(2), batch([2.0, 2.0], [0.1, 0.15]))
    assert bins.means() == (1.0, {"scale_2_2": 1.0, "timestep_0_0.2": 1.0})


def test_several_sizes_are_bins() -> None:
    bins = BinnedMean(Bins((2.0, 2.0), (0.0, 0.0), ("32x32", "24x32", "48x48")), "cpu")
    bins.add(torch.tensor([1.0, 2.0]), batch([2.0, 2.0], [0, 0], "32x32"))
    bins.add(torch.tensor([9.0]), batch([2.0], [0], "24x32"))
    mean, by_bin = bins.means()
    assert mean == 4
    assert {name: value for name, value in by_bin.items() if "size" in name} == {"size_32x32": 1.5, "size_24x32": 9.0}
