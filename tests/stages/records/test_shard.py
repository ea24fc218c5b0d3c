from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from stages.records.dataset import Dataset
from stages.records.shard import encode, hash_file, read_members, write_shard
from stages.records.trajectory import Trajectory, decode


def test_the_stock_reader_reads_the_shards(dataset: Dataset) -> None:
    shards = [dataset.root.where(shard) for shard in sorted(set(dataset.manifest["shard"].to_pylist()))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False).map(decode))
    assert all(isinstance(trajectory, Trajectory) for trajectory in read)
    assert [trajectory.index for trajectory in read] == list(range(12))
    for trajectory, row in zip(read, dataset.manifest.to_pylist(), strict=True):
        with dataset.open(row["shard"]) as file:
            assert torch.equal(dataset.read(file, row)["latent"], trajectory.latent)
        assert trajectory.scale == row["scale"]
        assert trajectory.condition == {"class_label": row["class_label"]}


def test_rows_lead_to_the_bytes_of_the_tensors(dataset: Dataset) -> None:
    row = dataset.manifest.to_pylist()[1]
    with tarfile.open(dataset.root.where(row["shard"])) as tar:
        member = tar.getmember(f"{row['key']}.safetensors")
        content = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert (member.offset_data, member.size, zlib.crc32(content)) == (row["offset"], row["size"], row["checksum"])
    assert len(safetensors.torch.load(content)["timestep"]) == row["records"]


def test_shards_are_ustar_without_times_and_sorted(dataset: Dataset) -> None:
    shard = Path(dataset.root.where(dataset.manifest["shard"][0].as_py()))
    assert shard.read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    assert all(member.mtime == 0 and member.uid == 0 for member in members)
    assert [member.name for member in members] == sorted(member.name for member in members)


def test_equal_records_make_equal_bytes(dataset: Dataset) -> None:
    shards = [dataset.root.where(dataset.manifest["shard"][0].as_py())]
    trajectories = list(webdataset.WebDataset(shards, shardshuffle=False).map(decode))
    again = io.BytesIO()
    write_shard(again, map(encode, trajectories))
    assert again.getvalue() == Path(shards[0]).read_bytes()


def test_a_file_is_hashed_whole() -> None:
    content = bytes(range(256)) * 40_000
    assert hash_file(io.BytesIO(content)) == hashlib.sha256(content).hexdigest()


def test_members_are_read_without_an_index(dataset: Dataset) -> None:
    row = dataset.manifest.to_pylist()[0]
    content = Path(dataset.root.where(row["shard"])).read_bytes()
    found = list(read_members(io.BytesIO(content), len(content)))
    assert len(found) == 6
    assert found[1][:2] == (f"{row['key']}.safetensors", row["offset"])
    for other, message in (
        (b"", "no member at byte 0"),
        (b"x" * 2048, "no member at byte 0"),
        (content[:1000], "of .* bytes"),
        (content[: found[1][1]], "of .* bytes"),
        (content + b"x", "bytes after its end"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_members(io.BytesIO(other), len(other)))


@pytest.mark.parametrize("size", [1 << 62, -1, (8 << 30) - 1])
def test_a_member_larger_than_its_shard_allocates_no_memory(size: int) -> None:
    member = tarfile.TarInfo("a.json")
    member.size = size
    content = member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(ValueError, match=f"'a.json' of {size} bytes"):
        list(read_members(io.BytesIO(content), len(content)))
