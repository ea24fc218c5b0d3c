from __future__ import annotations

import json
import resource
import zlib
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.records.dataset import Dataset, commit_unit, read_commits, read_info, snapshots
from stages.records.folder import open_folder
from stages.records.manifest import fingerprint
from stages.records.shard import encode
from stages.records.storage import seal, unseal
from tests.damages import SEALED
from tests.stages.records.test_record import trajectory


def change_info(root: Path, **changes: Any) -> None:
    (root / "dataset.json").write_bytes(seal(unseal((root / "dataset.json").read_bytes()) | changes))


def first_shard(root: Path) -> Path:
    return root / Dataset(root).manifest["shard"][0].as_py()


def test_the_first_attempt_wins_and_the_loser_takes_its_shard_away(tmp_path: Path) -> None:
    first = commit_unit(open_folder(tmp_path), 3, [encode(trajectory())])
    second = commit_unit(open_folder(tmp_path), 3, [encode(trajectory())])
    assert second == first
    assert [f"shards/{path.name}" for path in (tmp_path / "shards").iterdir()] == [first["shard"]]
    assert list(read_commits(open_folder(tmp_path))) == [first]


def test_the_description_tells_what_the_dataset_is(dataset: Dataset) -> None:
    info = dataset.info
    assert info["counts"] == {
        "units": 4,
        "trajectories": 12,
        "samples": 12,
        "records": 48,
        "bytes": info["counts"]["bytes"],
    }
    assert info["teacher"]["pipeline_class"] == "DiTPipeline"
    assert info["teacher"]["denoiser_class"] == "DiTTransformer2DModel"
    assert info["teacher"]["denoiser_subfolder"] == "transformer"
    assert info["teacher"]["prediction_type"] == "epsilon"
    assert info["guidance"] == {
        "rule": {"name": "ClassifierFreeGuidance", "pipeline": "DiTPipeline"},
        "scale_range": [1.0, 6.0],
    }
    assert info["tensors"]["latent"] == {"dtype": "float16", "shape": [4, 8, 8]}
    assert dataset.fingerprint == info["plans"][0]["fingerprint"] == fingerprint(dataset.manifest)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dataset"):
        Dataset(tmp_path)


def test_an_unfinished_dataset_is_refused(damaged: Path) -> None:
    change_info(damaged, complete=False)
    (damaged / "commits" / "00002.json").unlink()
    with pytest.raises(UserError, match="unfinished, 3 of 4 units"):
        Dataset(damaged)


def test_a_newer_schema_is_refused(damaged: Path) -> None:
    change_info(damaged, schema_version=2)
    with pytest.raises(UserError, match="schema 2 is newer than 1"):
        Dataset(damaged)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": "x"}', '{"schema_version": 1}', "\x00"])
def test_an_unreadable_description_is_refused(damaged: Path, content: str) -> None:
    (damaged / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="damaged: not as it was written"):
        read_info(open_folder(damaged))


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


def test_missing_and_truncated_shards_are_found_at_reading_when_they_may_be(damaged: Path) -> None:
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


def test_bytes_that_are_no_tensors_are_refused(damaged: Path) -> None:
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


def test_an_unreadable_commit_is_named(damaged: Path) -> None:
    (damaged / "commits" / "00001.json").write_text("{")
    with pytest.raises(UserError, match=r"00001\.json: damaged"):
        list(read_commits(open_folder(damaged)))


def test_an_edited_description_or_commit_is_refused(damaged: Path) -> None:
    told = (damaged / "dataset.json").read_text()
    (damaged / "dataset.json").write_text(told.replace('"scale_range": [\n      1.0', '"scale_range": [\n      2.0'))
    assert (damaged / "dataset.json").read_text() != told
    with pytest.raises(UserError, match=r"dataset\.json: damaged: not as it was written"):
        Dataset(damaged)
    (damaged / "commits" / "00002.json").write_bytes((damaged / "commits" / "00001.json").read_bytes())
    with pytest.raises(UserError, match=r"00002\.json: damaged"):
        list(read_commits(open_folder(damaged)))


def test_a_snapshot_that_is_not_there_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=f"has no snapshot 000000000000, only {dataset.fingerprint[:12]}"):
        Dataset(str(dataset.root), snapshot="0" * 64)
    assert Dataset(str(dataset.root), snapshot=dataset.fingerprint).newest
    assert snapshots(dataset.root) == [dataset.fingerprint]


def test_units_of_six_digits_come_after_those_of_five(tmp_path: Path) -> None:
    root = open_folder(tmp_path)
    for unit in (100_000, 99_999, 10_000, 10_001):
        commit_unit(root, unit, [encode(trajectory())])
    assert [commit["unit"] for commit in read_commits(root)] == [10_000, 10_001, 99_999, 100_000]


@pytest.mark.parametrize("place", [[-8, 8], [0, 1 << 62], [1 << 62, 1 << 63], ["a", "b"], [16, 8]])
def test_timesteps_that_are_said_to_be_elsewhere_are_not_looked_for(damaged: Path, place: list[Any]) -> None:
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[0]
    header = json.dumps({"timestep": {"dtype": "I64", "shape": [1], "data_offsets": place}}).encode()
    content = bytearray((damaged / row["shard"]).read_bytes())
    told = len(header).to_bytes(8, "little") + header
    content[row["offset"] : row["offset"] + len(told)] = told
    (damaged / row["shard"]).write_bytes(content)
    with pytest.raises(UserError, match=f"expected the timesteps of {row['key']}"):
        dataset.timesteps(row)


def test_a_header_of_2_to_63_bytes_takes_no_memory(damaged: Path) -> None:
    SEALED["a header of 2^63 bytes, sealed"](damaged)
    dataset = Dataset(damaged)
    row = dataset.manifest.to_pylist()[3]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with dataset.open(row["shard"]) as file, pytest.raises(UserError, match=rf"^\S*{row['shard']}: damaged: [^\n]*$"):
        dataset.read(file, row)
    with pytest.raises(UserError, match=rf"^\S*{row['shard']}: damaged: [^\n]*$"):
        dataset.timesteps(row)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 15  # KiB


def test_another_number_of_records_than_is_told_is_refused(dataset: Dataset) -> None:
    row = dataset.manifest.to_pylist()[0]
    with dataset.open(row["shard"]) as file:
        assert len(dataset.read(file, row | {"chosen": [1], "records": 1})["timestep"]) == 4
        for count in (1, 3, 5):
            with pytest.raises(UserError, match=f"expected {count} records in {row['key']}, found 4"):
                dataset.read(file, row | {"records": count})
