"""Records per second that the training stream reads from the page cache, beside a loader in the reference's style.

python -m tests.benchmarks.stream_speed [trajectories of 16 KB records] [epochs]

The reference's style is a folder per trajectory, with a memmap and a pickle opened for each record. Both loaders give
the same records, shuffled, in batches of 64, in one process. With 4 KB records there are four times as many
trajectories, so as many bytes. The default number exceeds the largest window, so that every epoch reads every record
from its file. The stream's first epoch is listed separately, because it touches its memory for the first time. Of the
other epochs the fastest counts, as does the fastest of as many pieces of the reference's epoch, because other processes
slow some.

Prints one JSON object: records per second by the clock and by the process's CPU time, which includes both threads of
the stream, and the CPU time of each part of the work.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as ItemDataset

from stages.records.dataset import Dataset
from stages.records.shard import encode
from stages.records.trajectory import Trajectory
from stages.train.batch import Batch
from stages.train.selection import SelectedSample
from stages.train.stream import RecordStream
from stages.train.window import Memory, load
from tests.support import made_up

BATCH_SIZE, STEPS, TRAJECTORIES_PER_SHARD = 64, 20, 50
RECORDS = [
    ("16 KB", (4, 32, 32), 1),
    ("4 KB", (4, 16, 16), 4),
]  # name, shape of latent and target in fp16, factor of the number
WINDOWS = {"1 GiB": 1 << 30, "128 MiB": 1 << 27}
PIECE = 4000  # records of the reference's epoch per measurement
MEASURED_SAMPLES = 1000  # for the times of the parts


def trajectory(index: int, shape: tuple[int, ...]) -> Trajectory:
    """Make a trajectory whose scale is its number, so that scale and timestep identify a record."""
    generator = np.random.default_rng(index)
    latent, target = (
        torch.from_numpy(generator.integers(0, 15000, (STEPS, *shape), dtype=np.int16)).view(torch.float16)
        for _ in range(2)
    )
    label = index % 1000
    return Trajectory(
        index, index, float(index), {"class_label": label}, latent, torch.arange(STEPS), target,
        {"class_labels": torch.tensor(label)}, torch.ones(STEPS), torch.zeros(STEPS),
    )  # fmt: skip


def write_dataset(root: Path, count: int, shape: tuple[int, ...]) -> Dataset:
    starts = range(0, count, TRAJECTORIES_PER_SHARD)
    units = [range(start, min(start + TRAJECTORIES_PER_SHARD, count)) for start in starts]
    made_up.write_dataset(root, [[encode(trajectory(j, shape)) for j in unit] for unit in units])
    return Dataset(root)


def write_folders(root: Path, count: int, shape: tuple[int, ...]) -> list[Path]:
    """Write the same records, with a folder per trajectory."""
    folders = [root / f"{i:06d}" for i in range(count)]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        whole = trajectory(i, shape)
        np.save(folder / "records.npy", torch.stack([whole.latent, whole.target], 1).numpy())
        conditioning = {"timestep": whole.timestep, "scale": torch.tensor(whole.scale), **whole.cond}
        torch.save(conditioning, folder / "conditioning.pt")
    return folders


class Folders(ItemDataset):
    """One record per item, its files opened anew each time."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    def __len__(self) -> int:
        return len(self.folders) * STEPS

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        folder, step = self.folders[i // STEPS], i % STEPS
        records = np.load(folder / "records.npy", mmap_mode="r")
        latent, target = torch.from_numpy(records[step].copy())
        conditioning = torch.load(folder / "conditioning.pt", weights_only=True)
        return latent, target, conditioning["timestep"][step], conditioning["scale"], conditioning["class_labels"]


def reference_batches(folders: list[Path]) -> Iterator[Batch]:
    """Yield the batches of one epoch."""
    for latent, target, timestep, scale, label in DataLoader(Folders(folders), BATCH_SIZE, shuffle=True):
        yield Batch(latent, timestep, target, scale, {"class_labels": label})


def stream_batches(dataset: Dataset, shuffle_bytes: int) -> Iterator[Batch]:
    """Yield the batches of endless epochs."""
    return iter(
        RecordStream(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())], BATCH_SIZE, 0, shuffle_bytes)
    )


def speed(batches: Iterator[Batch], records: int) -> dict[str, int]:
    """Return the speed over about this many records."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = sum(len(batch) for batch in islice(batches, -(-records // BATCH_SIZE)))
    return {
        "records_per_second": round(done / (time.perf_counter() - wall)),
        "records_per_cpu_second": round(done / (time.process_time() - cpu)),
    }


def fastest(batches: Iterator[Batch], records: int, times: int) -> dict[str, int]:
    pieces = [speed(batches, records) for _ in range(times)]
    return {name: max(piece[name] for piece in pieces) for name in pieces[0]}


def stream_speed(dataset: Dataset, shuffle_bytes: int, epochs: int) -> dict[str, int]:
    batches, records = stream_batches(dataset, shuffle_bytes), dataset.plan.counts.records
    first = speed(batches, records)["records_per_second"]
    return fastest(batches, records, epochs) | {"first_epoch": first}


def parts(dataset: Dataset) -> dict[str, float]:
    """Return CPU microseconds per record: read, checksum, decoding, copy into the window, and gather."""
    rows = dataset.manifest.to_pylist()[:MEASURED_SAMPLES]
    spent = dict.fromkeys(("read", "crc32", "decode"), 0.0)

    def timed(part: str, work: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = work()
        spent[part] = spent.get(part, 0.0) + time.thread_time() - start
        return result

    def content(row: dict[str, Any]) -> bytes:
        with dataset.open(row["shard"]) as file:
            file.seek(row["offset"])
            return file.read(row["size"])

    for row in rows:
        read = timed("read", lambda: content(row))  # noqa: B023  called at once
        timed("crc32", lambda: zlib.crc32(read))  # noqa: B023
        timed("decode", lambda: safetensors.torch.load(read))  # noqa: B023
    memory: Memory = {}
    samples = [*map(SelectedSample, rows)]
    load(dataset, samples, memory=memory)
    window = timed("load", lambda: load(dataset, samples, memory=memory))
    order = torch.randperm(len(window)).split(BATCH_SIZE)
    timed("gather", lambda: [len(window.take(chosen)) for chosen in order])
    spent["place"] = spent.pop("load") - sum(spent[part] for part in ("read", "crc32", "decode"))
    return {part: round(seconds / len(window) * 1e6, 2) for part, seconds in spent.items()}


def measured(root: Path, count: int, shape: tuple[int, ...], epochs: int) -> dict[str, Any]:
    dataset = write_dataset(root / "dataset", count, shape)
    streams = {window: stream_speed(dataset, size, epochs) for window, size in WINDOWS.items()}
    folders = write_folders(root / "folders", count, shape)
    reference = fastest(reference_batches(folders), min(count * STEPS // epochs, PIECE), epochs)
    for info in streams.values():
        info["times_reference"] = round(info["records_per_second"] / reference["records_per_second"], 1)
    return {
        "records": count * STEPS, "bytes": dataset.plan.counts.bytes, "stream_by_window": streams,
        "reference": reference, "microseconds_by_part": parts(dataset),
    }  # fmt: skip


def main(trajectories: str = "3500", epochs: str = "5") -> None:
    info = {}
    for size, shape, times in RECORDS:
        with tempfile.TemporaryDirectory() as folder:
            info[size] = measured(Path(folder), times * int(trajectories), shape, int(epochs))
    print(json.dumps({"torch_threads": torch.get_num_threads(), "by_record_size": info}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
