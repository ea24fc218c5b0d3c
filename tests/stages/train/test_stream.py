from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.shard import encode
from stages.train.batch import Batch
from stages.train.selection import SelectedSample
from stages.train.stream import RecordStream
from stages.train.window import Window, load
from tests.stages.records.test_trajectory import trajectory
from tests.support.made_up import write_dataset


def stream(dataset: Dataset, consumed: int = 0, pending: Sequence[int] = (), **changes: Any) -> RecordStream:
    options = {"batch_size": 5, "seed": 0, "shuffle_bytes": 1 << 30} | changes
    made = RecordStream(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())], **options)
    made.go_to(consumed, pending)
    return made


def identity(batch: Batch) -> list[tuple[float, int, int]]:
    """Scale, timestep and class identify a record of the tiny dataset."""
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


def test_records_keep_their_conditions(dataset: Dataset) -> None:
    window = load(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())])
    whole = window.take(torch.arange(len(window)))
    known = {key: i for i, key in enumerate(identity(whole))}
    for batch in islice(stream(dataset), 10):
        for i, key in enumerate(identity(batch)):
            assert torch.equal(batch.latent[i], whole.latent[known[key]])
            assert torch.equal(batch.target[i], whole.target[known[key]])


def test_the_order_depends_on_the_seed(dataset: Dataset) -> None:
    assert first(dataset, 20) == first(dataset, 20)
    assert first(dataset, 20) != first(dataset, 20, seed=1)


@pytest.mark.parametrize("shuffle_bytes", [10_000, 1 << 30])
@pytest.mark.parametrize("stop", [0, 1, 9, 10, 23])
def test_a_resumed_stream_continues_exactly(dataset: Dataset, stop: int, shuffle_bytes: int) -> None:
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
    assert all(sum(sample.row["size"] for sample in window) <= 10_000 for window in windows)


@pytest.mark.parametrize("shuffle_bytes", [10_000, 1 << 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_each_batch_of_the_one_order(dataset: Dataset, world_size: int, shuffle_bytes: int) -> None:
    """Six records per step; an epoch has eight steps, and four batches span two windows."""
    size = 6 // world_size
    options = {"batch_size": size, "world_size": world_size, "shuffle_bytes": shuffle_bytes}
    streams = [stream(dataset, rank=rank, **options) for rank in range(world_size)]
    alone = first(dataset, 16, batch_size=6, shuffle_bytes=shuffle_bytes)
    together = []
    for step, batches in enumerate(islice(zip(*streams, strict=True), 16), 1):
        parts = [identity(batch) for batch in batches]
        assert [len(part) for part in parts] == [size] * world_size
        together += [record for turn in zip(*parts, strict=True) for record in turn]
        assert [one.consumed for one in streams] == [6 * step] * world_size
    assert together == alone
    assert set(Counter(together[:48]).values()) == {1}


def test_a_run_continues_with_another_number_of_processes(dataset: Dataset) -> None:
    whole = first(dataset, 20, batch_size=6)
    begun = stream(dataset, batch_size=2, rank=1, world_size=3)
    for _ in islice(begun, 7):
        pass
    resumed = [stream(dataset, batch_size=3, rank=i, world_size=2, consumed=begun.consumed) for i in range(2)]
    assert begun.consumed == 42
    for step, batches in enumerate(islice(zip(*resumed, strict=True), 13), 7):
        even, odd = map(identity, batches)
        assert (even, odd) == (whole[6 * step : 6 * step + 6 : 2], whole[6 * step + 1 : 6 * step + 6 : 2])


def test_a_process_gathers_only_its_own_records(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = Window.take
    monkeypatch.setattr(Window, "take", lambda window, chosen: taken.append(len(chosen)) or take(window, chosen))
    for _ in islice(stream(dataset, batch_size=4, rank=1, world_size=3), 9):
        pass
    assert sum(taken) == 36


def test_windows_of_the_same_samples_are_read_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("stages.train.window.load", lambda *arguments: read.append(arguments[1]) or load(*arguments))
    assert len(set(first(dataset, 48, batch_size=5))) == 48
    assert len(read) == 1
    first(dataset, 48, batch_size=5, shuffle_bytes=10_000)
    assert len(read) > 5


def test_a_closed_stream_leaves_no_thread(dataset: Dataset) -> None:
    before = threading.active_count()
    batches = iter(stream(dataset, shuffle_bytes=10_000))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_records_are_located_by_their_position(dataset: Dataset, world_size: int) -> None:
    running = stream(dataset, shuffle_bytes=10_000, rank=world_size - 1, world_size=world_size)
    rows = {row["key"]: row for row in dataset.manifest.to_pylist()}
    for batch in islice(running, 12):
        names = running.locate_records(running.drawn)[world_size - 1 :: world_size]
        for i, name in enumerate(names):
            shard, key, number, scale, timestep = re.fullmatch(
                r"(\S+) (\S+) record (\d+): scale (\S+), timestep (\S+)", name
            ).groups()
            sample = load(dataset, [SelectedSample(rows[key])])
            assert rows[key]["shard"] == shard
            assert torch.equal(sample.records.latent[int(number)], batch.latent[i])
            assert float(scale) == pytest.approx(batch.scale[i].item(), rel=1e-4)
            assert float(timestep) == batch.timestep[i]


def test_chosen_records_are_named_by_their_number_in_the_sample(dataset: Dataset) -> None:
    samples = [SelectedSample(row, [1, 3]) for row in dataset.manifest.to_pylist()]
    names = RecordStream(dataset, samples, 5, 0, 1 << 30).locate_records(torch.arange(24))
    assert Counter(re.search(r"record (\d)", name)[1] for name in names) == {"1": 12, "3": 12}


def test_damage_in_mid_stream_names_the_shard_and_the_way_out(damaged: Path) -> None:
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[5]
    flip_a_bit(damaged, row)
    with pytest.raises(UserError, match=rf"{Path(row['shard']).name}.*expected CRC-32 .* found .*on_damage=skip"):
        first(dataset, 10)


def flip_a_bit(root: Path, row: dict[str, Any]) -> None:
    content = bytearray((root / row["shard"]).read_bytes())
    content[row["offset"] + 200] ^= 4
    (root / row["shard"]).write_bytes(content)


@pytest.fixture
def two_thirds(damaged: Path) -> tuple[Dataset, set[str]]:
    """A dataset with a missing and a truncated shard, and the names of the lost samples."""
    rows = Dataset(damaged).manifest.to_pylist()
    missing, short = rows[0]["shard"], rows[-1]["shard"]
    (damaged / missing).unlink()
    cut = rows[-1]
    (damaged / short).write_bytes((damaged / short).read_bytes()[: cut["offset"] + cut["size"] // 2])
    lost = {f"{row['shard']} {row['key']}" for row in [*rows, cut] if row["shard"] == missing or row is cut}
    return Dataset(damaged, check_sizes=False), lost


@pytest.mark.parametrize("shuffle_bytes", [1, 10_000, 1 << 30])
def test_damaged_samples_are_left_out_and_counted(
    two_thirds: tuple[Dataset, set[str]], shared_dataset: Path, shuffle_bytes: int
) -> None:
    dataset, lost = two_thirds
    running = stream(dataset, shuffle_bytes=shuffle_bytes, skip_damaged=True)
    batches = list(islice(running, 16))
    assert {len(batch) for batch in batches} == {5}
    records = [record for batch in batches for record in identity(batch)]
    samples = map(SelectedSample, dataset.manifest.to_pylist())
    whole = load(dataset, [sample for sample in samples if sample.name not in lost])
    expected = identity(whole.take(torch.arange(len(whole))))
    assert len(expected) == 32
    for epoch in range(2):
        assert sorted(records[32 * epoch : 32 * epoch + 32]) == sorted(expected)
    assert running.skipped == dict.fromkeys(lost, 4)
    assert 96 < running.consumed <= 144


@pytest.mark.parametrize("shuffle_bytes", [10_000, 1 << 30])
@pytest.mark.parametrize("stop", [1, 6, 7, 13])
def test_a_stream_that_skips_damage_resumes_exactly(
    two_thirds: tuple[Dataset, set[str]], stop: int, shuffle_bytes: int
) -> None:
    dataset, _ = two_thirds
    options = {"shuffle_bytes": shuffle_bytes, "skip_damaged": True}
    whole = first(dataset, 20, **options)
    begun = stream(dataset, **options)
    for _ in islice(begun, stop):
        pass
    assert first(dataset, 20 - stop, consumed=begun.consumed, **options) == whole[5 * stop :]


def test_processes_skip_the_same_records(two_thirds: tuple[Dataset, set[str]]) -> None:
    dataset, _ = two_thirds
    alone = stream(dataset, batch_size=6, skip_damaged=True)
    streams = [stream(dataset, batch_size=3, rank=rank, world_size=2, skip_damaged=True) for rank in range(2)]
    for whole, even, odd in islice(zip(alone, *streams, strict=True), 12):
        assert (identity(even), identity(odd)) == (identity(whole)[::2], identity(whole)[1::2])
        assert [one.consumed for one in streams] == [alone.consumed] * 2


def test_skipped_records_are_not_drawn(two_thirds: tuple[Dataset, set[str]]) -> None:
    dataset, lost = two_thirds
    running = stream(dataset, skip_damaged=True)
    for batch in islice(running, 10):
        names = running.locate_records(running.drawn)
        assert [float(name.split()[-1]) for name in names] == batch.timestep.tolist()
        assert not {" ".join(name.split()[:2]) for name in names} & lost


@pytest.mark.parametrize("shuffle_bytes", [1, 1 << 30])
@pytest.mark.parametrize("consumed", [0, 17])
def test_a_fully_damaged_dataset_is_refused(damaged: Path, consumed: int, shuffle_bytes: int) -> None:
    for shard in (damaged / "shards").iterdir():
        shard.unlink()
    dataset = Dataset(damaged, check_sizes=False)
    with pytest.raises(UserError, match="every record to train on is damaged: .*pipeline.verify"):
        first(dataset, 1, skip_damaged=True, shuffle_bytes=shuffle_bytes, consumed=consumed)


def test_guidance_stats_come_with_their_records(tmp_path: Path) -> None:
    one = replace(trajectory(), guidance_cosine=torch.arange(5.0) / 10, guidance_delta=torch.arange(5.0))
    other = replace(one, index=8, guidance_delta=torch.arange(5.0, 10))
    write_dataset(tmp_path, [[encode(one), encode(other)]])
    for batch in islice(stream(Dataset(tmp_path), batch_size=3), 10):
        on_device = batch.to("cpu", torch.float16)
        assert {name: value.dtype for name, value in on_device.guidance_stats.items()} == dict.fromkeys(
            ("guidance_cosine", "guidance_delta"), torch.float32
        )
        step = 4 - batch.timestep  # the trajectory's timesteps fall
        assert torch.equal(on_device.guidance_stats["guidance_cosine"], step / 10)
        assert torch.equal(on_device.guidance_stats["guidance_delta"] % 5, step.float())


def test_batches_are_pinned_if_there_is_a_gpu(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: pinned.append(value) or value)
    first(dataset, 1, pin=True)
    assert not pinned or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (batch,) = islice(stream(dataset, pin=True), 1)
    everything = [batch.latent, batch.target, batch.timestep, batch.scale, *batch.cond.values()]
    assert {id(value) for value in everything} <= {id(value) for value in pinned}
