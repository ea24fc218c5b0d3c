from __future__ import annotations

import math

import torch

from stages.train.bins import BinnedMean


def test_means_are_computed_per_bin_and_reset() -> None:
    bins = BinnedMean((1.0, 5.0), (0.0, 1000.0), "cpu")
    values, scale = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([1.0, 1.5, 9.0])
    bins.add(values, scale, torch.tensor([0, 999, 950]))
    bins.add(torch.tensor([20.0]), torch.tensor([4.5]), torch.tensor([1000]))
    mean, by_bin = bins.means()
    assert mean == 8.5
    assert by_bin == {"scale_1_2": 2.0, "scale_4_5": 15.0, "timestep_0_200": 1.0, "timestep_800_1000": 11.0}
    mean, by_bin = bins.means()
    assert math.isnan(mean)
    assert by_bin == {}


def test_a_single_scale_is_one_bin() -> None:
    bins = BinnedMean((2.0, 2.0), (0.0, 1.0), "cpu")
    bins.add(torch.ones(2), torch.full((2,), 2.0), torch.tensor([0.1, 0.15]))
    assert bins.means() == (1.0, {"scale_2_2": 1.0, "timestep_0_0.2": 1.0})
