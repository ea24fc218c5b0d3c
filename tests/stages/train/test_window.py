from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.selection import SelectedSample
from stages.train.window import load


def test_samples_come_in_the_requested_order(dataset: Dataset) -> None:
    samples = [*map(SelectedSample, dataset.manifest.to_pylist())]
    everything = load(dataset, samples)
    backwards = load(dataset, samples[::-1])
    places = torch.arange(48).view(12, 4).flip(0).flatten()
    assert torch.equal(backwards.records.latent, everything.records.latent[places])
    assert torch.equal(
        backwards.take(torch.arange(48)).cond["class_labels"], everything.take(places).cond["class_labels"]
    )


def test_a_window_reuses_the_buffers_of_an_earlier_one(dataset: Dataset) -> None:
    samples = [*map(SelectedSample, dataset.manifest.to_pylist())]
    memory: dict[str, torch.Tensor] = {}
    larger = load(dataset, samples[:3], memory=memory)
    kept = larger.take(torch.arange(12))
    smaller = load(dataset, samples[3:5], memory=memory)
    assert smaller.records.latent.data_ptr() == larger.records.latent.data_ptr()
    assert torch.equal(smaller.records.latent, load(dataset, samples[3:5]).records.latent)
    assert torch.equal(kept.latent, load(dataset, samples[:3]).records.latent)


def test_a_missing_shard_is_named_or_left_out(damaged: Path) -> None:
    samples = [*map(SelectedSample, Dataset(damaged).manifest.to_pylist())]
    (damaged / samples[0].row["shard"]).unlink()
    dataset = Dataset(damaged, check_sizes=False)
    with pytest.raises(UserError, match=r"\.tar: damaged: .* found no such file: .*on_damage=skip"):
        load(dataset, samples)
    window = load(dataset, samples, skip_damaged=True)
    assert window.intact.tolist() == [False] * 12 + [True] * 36
    assert window.damaged == {sample.name: 4 for sample in samples[:3]}
    whole = load(dataset, samples[3:])
    assert torch.equal(
        window.take(torch.arange(12, 48)).cond["class_labels"], whole.take(torch.arange(36)).cond["class_labels"]
    )
    assert torch.equal(window.records.latent[12:], whole.records.latent)
