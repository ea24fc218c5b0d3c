from __future__ import annotations

import json
import resource
import zlib
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.plans import snapshots
from tests.stages.records.test_plans import change_info
from tests.support.damages import SEALED


def first_shard(root: Path) -> Path:
    return root / Dataset(root).manifest["shard"][0].as_py()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dataset"):
        Dataset(tmp_path)


def test_a_name_on_the_hub_without_its_scheme_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="if it is on the hub, say data_dir=hf://datasets/owner/name$"):
        Dataset("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for folder in ("owner/name", "name", "./name", "/owner/name"):
        with pytest.raises(UserError, match="a FILE of configs/generate$"):
            Dataset(folder)


def test_an_unfinished_dataset_is_refused(damaged: Path) -> None:
    change_info(damaged, complete=False)
    (damaged / "commits" / "00002.json").unlink()
    with pytest.raises(UserError, match="unfinished, 3 of 4 units"):
        Dataset(damaged)


def test_a_missing_shard_is_named(damaged: Path) -> None:
    shard = first_shard(damaged)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}.*no such file"):
        Dataset(damaged)


def test_a_truncated_shard_is_named(damaged: Path) -> None:
    shard = first_shard(damaged)
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=rf"{shard.name}.*expected \d+ bytes, found \d+ bytes"):
        Dataset(damaged)


def test_missing_and_truncated_shards_are_found_at_reading_if_allowed(damaged: Path) -> None:
    missing, short = (damaged / name for name in sorted(set(Dataset(damaged).manifest["shard"].to_pylist()))[:2])
    missing.unlink()
    short.write_bytes(short.read_bytes()[:1000])
    dataset = Dataset(damaged, check_sizes=False)
    rows = {row["shard"].split("/")[1]: row for row in dataset.manifest.to_pylist()}
    with pytest.raises(UserError, match=rf"{missing.name}: damaged: .*no such file.*on_damage=skip"):
        dataset.open(rows[missing.name]["shard"])
    with dataset.open(rows[short.name]["shard"]) as file, pytest.raises(UserError, match=rf"{short.name}.*CRC-32"):
        dataset.read(file, rows[short.name])
    for row in (rows[missing.name], rows[short.name]):
        with pytest.raises(UserError, match=r"\.tar: damaged"):
            dataset.timesteps(row)


def test_bytes_other_than_tensors_are_refused(damaged: Path) -> None:
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[0]
    header = {"offset": 0, "size": 512, "checksum": zlib.crc32((damaged / row["shard"]).read_bytes()[:512])}
    with dataset.open(row["shard"]) as file, pytest.raises(UserError, match=rf"expected the tensors of {row['key']}"):
        dataset.read(file, row | header)
    with pytest.raises(UserError, match=rf"expected the timesteps of {row['key']}"):
        dataset.timesteps(row | header)


def test_a_changed_manifest_is_named(damaged: Path) -> None:
    with (damaged / "manifest.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="manifest.parquet: damaged"):
        Dataset(damaged)


def test_a_flipped_bit_is_found_at_reading(damaged: Path) -> None:
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[0]
    content = bytearray((damaged / row["shard"]).read_bytes())
    content[row["offset"] + row["size"] // 2] ^= 1
    (damaged / row["shard"]).write_bytes(content)
    with (damaged / row["shard"]).open("rb") as file, pytest.raises(UserError, match=rf"CRC-32 .* of {row['key']}"):
        dataset.read(file, row)


def test_a_missing_snapshot_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=f"has no snapshot 000000000000, only {dataset.fingerprint[:12]}"):
        Dataset(str(dataset.root), snapshot="0" * 64)
    assert Dataset(str(dataset.root), snapshot=dataset.fingerprint).newest
    assert snapshots(dataset.root) == [dataset.fingerprint]


@pytest.mark.parametrize("place", [[-8, 8], [0, 1 << 62], [1 << 62, 1 << 63], ["a", "b"], [16, 8]])
def test_offsets_of_timesteps_outside_the_sample_are_refused(damaged: Path, place: list[Any]) -> None:
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[0]
    header = json.dumps({"timestep": {"dtype": "I64", "shape": [1], "data_offsets": place}}).encode()
    content = bytearray((damaged / row["shard"]).read_bytes())
    prefix = len(header).to_bytes(8, "little") + header
    content[row["offset"] : row["offset"] + len(prefix)] = prefix
    (damaged / row["shard"]).write_bytes(content)
    with pytest.raises(UserError, match=f"expected the timesteps of {row['key']}"):
        dataset.timesteps(row)


def test_a_header_of_2_to_63_bytes_allocates_no_memory(damaged: Path) -> None:
    SEALED["a header of 2^63 bytes, sealed"](damaged)
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[3]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with dataset.open(row["shard"]) as file, pytest.raises(UserError, match=rf"^\S*{row['shard']}: damaged: [^\n]*$"):
        dataset.read(file, row)
    with pytest.raises(UserError, match=rf"^\S*{row['shard']}: damaged: [^\n]*$"):
        dataset.timesteps(row)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 15  # KiB


def test_another_number_of_records_than_in_the_row_is_refused(dataset: Dataset) -> None:
    row = dataset.manifest.to_pylist()[0]
    with dataset.open(row["shard"]) as file:
        assert len(dataset.read(file, row)["timestep"]) == 4
        for count in (1, 3, 5):
            with pytest.raises(UserError, match=f"expected {count} records in {row['key']}, found 4"):
                dataset.read(file, row | {"records": count})
