"""How many records a second the training stream reads from the page cache, beside a loader in the reference's manner.

python -m tests.benchmarks.stream_speed [trajectories of 16 KB records] [epochs]

The reference's manner: a folder per trajectory, and for each record a memmap and a pickle opened. Both hand out the
same records, shuffled, in batches of 64, in one process. Of 4 KB records there are four times as many trajectories, so
as many bytes: with the default number more than the largest window, so that every record is read from its file in every
epoch. The stream's first epoch is told apart, because its memory is touched for the first time there. Of the others the
fastest counts, and so it does of as many pieces of the reference's epoch: what else runs on the machine slows some.

Prints one JSON object: records a second by the clock and by the process's CPU time, to which both threads of the stream
add, and the CPU time of each part of the work.
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
RECORDS = [("16 KB", (4, 32, 32), 1), ("4 KB", (4, 16, 16), 4)]  # latent and target in fp16, their shape, times as many
WINDOWS = {"1 GiB": 1 << 30, "128 MiB": 1 << 27}
PIECE = 4000  # records, of the reference's epoch
MEASURED_SAMPLES = 1000  # of which the parts of the work are timed


def trajectory(index: int, shape: tuple[int, ...]) -> Trajectory:
    """Its scale is its number, so that scale and timestep tell the records apart."""
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
    """The same records, a folder per trajectory."""
    folders = [root / f"{i:06d}" for i in range(count)]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        whole = trajectory(i, shape)
        np.save(folder / "records.npy", torch.stack([whole.latent, whole.target], 1).numpy())
        conditioning = {"timestep": whole.timestep, "scale": torch.tensor(whole.guidance_scale), **whole.cond}
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
    """One epoch."""
    for latent, target, timestep, scale, label in DataLoader(Folders(folders), BATCH_SIZE, shuffle=True):
        yield Batch(latent, timestep, target, scale, {"class_labels": label})


def stream_batches(dataset: Dataset, shuffle_bytes: int) -> Iterator[Batch]:
    """Epochs without end."""
    return iter(
        RecordStream(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())], BATCH_SIZE, 0, shuffle_bytes)
    )


def speed(batches: Iterator[Batch], records: int) -> dict[str, int]:
    """Over about so many records."""
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
    """CPU microseconds a record: of the file, its checksum, its decoding, the copy into the window, and the gather."""
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
