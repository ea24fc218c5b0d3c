from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.stream import Batch, RecordStream, collate, concatenate, load


def stream(dataset: Dataset, **changes: Any) -> RecordStream:
    options = {"batch_size": 5, "seed": 0, "shuffle_bytes": 1 << 30} | changes
    return RecordStream(dataset, dataset.manifest.to_pylist(), **options)


def identity(batch: Batch) -> list[tuple[float, int, int]]:
    """Scale, timestep and class tell the records of the tiny dataset apart."""
    return list(zip(batch.scale.tolist(), batch.timestep.tolist(), batch.cond["class_labels"].tolist(), strict=True))


def first(dataset: Dataset, count: int, **changes: Any) -> list[tuple[float, int, int]]:
    batches = islice(stream(dataset, **changes), count)
    return [record for batch in batches for record in identity(batch)]


@pytest.mark.parametrize("shuffle_bytes", [1, 10_000, 1 << 30])
def test_every_record_comes_once_per_epoch(dataset: Dataset, shuffle_bytes: int) -> None:
    records = first(dataset, 48, batch_size=5, shuffle_bytes=shuffle_bytes)
    assert len(records) == 240
    for epoch in range(5):
        assert set(Counter(records[epoch * 48 : (epoch + 1) * 48]).values()) == {1}
    assert records[:48] != records[48:96]


def test_records_keep_what_belongs_to_them(dataset: Dataset) -> None:
    rows = dataset.manifest.to_pylist()
    window = load(dataset, rows)
    whole = window.take(torch.arange(len(window)))
    known = {key: i for i, key in enumerate(identity(whole))}
    for batch in islice(stream(dataset), 10):
        for i, key in enumerate(identity(batch)):
            assert torch.equal(batch.latent[i], whole.latent[known[key]])
            assert torch.equal(batch.target[i], whole.target[known[key]])


def test_the_order_follows_from_the_seed(dataset: Dataset) -> None:
    assert first(dataset, 20) == first(dataset, 20)
    assert first(dataset, 20) != first(dataset, 20, seed=1)


@pytest.mark.parametrize("shuffle_bytes", [10_000, 1 << 30])
@pytest.mark.parametrize("stop", [0, 1, 9, 10, 23])
def test_a_resumed_stream_goes_on_exactly_there(dataset: Dataset, stop: int, shuffle_bytes: int) -> None:
    whole = first(dataset, 30, shuffle_bytes=shuffle_bytes)
    begun = stream(dataset, shuffle_bytes=shuffle_bytes)
    for _ in islice(begun, stop):
        pass
    assert begun.consumed == 5 * stop
    resumed = first(dataset, 30 - stop, shuffle_bytes=shuffle_bytes, consumed=begun.consumed)
    assert resumed == whole[5 * stop :]


def test_a_small_window_mixes_less_but_loses_nothing(dataset: Dataset) -> None:
    windows = list(stream(dataset, shuffle_bytes=10_000)._cut(0))
    assert len(windows) > 2
    assert sum(len(window) for window in windows) == 12
    assert all(sum(row["size"] for row in window) <= 10_000 for window in windows)


def test_damage_in_mid_stream_names_the_shard(damaged: Path) -> None:
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[5]
    content = bytearray((damaged / row["shard"]).read_bytes())
    content[row["offset"] + 200] ^= 4
    (damaged / row["shard"]).write_bytes(content)
    with pytest.raises(UserError, match=Path(row["shard"]).name):
        first(dataset, 10)


def test_embeddings_of_several_lengths_are_padded_with_their_masks() -> None:
    rows = [{"words": torch.ones(n, 3), "words_mask": torch.ones(n, dtype=torch.bool)} for n in (2, 4)]
    cond = collate(rows)
    assert cond["words"].shape == (2, 4, 3)
    assert cond["words"].sum((1, 2)).tolist() == [6, 12]
    assert cond["words_mask"].tolist() == [[True, True, False, False], [True] * 4]
    zeros = torch.zeros(1)
    parts = [Batch(zeros, zeros, zeros, zeros, collate([row])) for row in rows]
    assert torch.equal(concatenate(parts).cond["words"], cond["words"])
    assert torch.equal(concatenate(parts).cond["words_mask"], cond["words_mask"])


def test_embeddings_of_several_lengths_without_a_mask_are_refused() -> None:
    with pytest.raises(UserError, match="cond.words differs in length .* has no mask"):
        collate([{"words": torch.ones(2, 3)}, {"words": torch.ones(4, 3)}])
