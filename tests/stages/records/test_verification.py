from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.verification import verify


def shards(root: Path) -> list[str]:
    return sorted(set(Dataset(root).manifest["shard"].to_pylist()))


def test_a_whole_dataset_is_counted(shared_dataset: Path) -> None:
    found = verify(shared_dataset)
    assert found["ok"]
    assert found["problems"] == []
    assert (found["trajectories"], found["records"], found["shards"]) == (12, 48, 4)
    assert found["bytes"] == sum(path.stat().st_size for path in (shared_dataset / "shards").iterdir())
    histograms = found["histograms"]
    assert sum(bin["count"] for bin in histograms["scale"]) == 12
    assert sum(bin["count"] for bin in histograms["timestep"]) == 48
    assert histograms["class_label"] == {"0": 2, "1": 2} | {str(i): 1 for i in range(2, 10)}


@pytest.mark.parametrize("place", [0, 100, 600, -1])
def test_a_flipped_bit_anywhere_is_found(damaged: Path, place: int) -> None:
    shard = shards(damaged)[2]
    content = bytearray((damaged / shard).read_bytes())
    content[place] ^= 1
    (damaged / shard).write_bytes(content)
    (problem,) = verify(damaged)["problems"]
    assert problem["shard"] == shard
    assert problem["expected"].startswith("SHA-256")
    assert problem["found"] not in problem["expected"]


def test_each_missing_truncated_and_swapped_shard_is_named_once(damaged: Path) -> None:
    missing, truncated, one, two = shards(damaged)
    (damaged / missing).unlink()
    (damaged / truncated).write_bytes((damaged / truncated).read_bytes()[:1000])
    contents = (damaged / one).read_bytes(), (damaged / two).read_bytes()
    (damaged / one).write_bytes(contents[1])
    (damaged / two).write_bytes(contents[0])
    found = verify(damaged)
    assert not found["ok"]
    assert sorted(problem["shard"] for problem in found["problems"]) == [missing, truncated, one, two]


def test_an_unfinished_dataset_is_a_problem(damaged: Path) -> None:
    info = json.loads((damaged / "dataset.json").read_text())
    (damaged / "dataset.json").write_text(json.dumps(info | {"complete": False}))
    (damaged / "commits" / "00003.json").unlink()
    (problem,) = verify(damaged)["problems"]
    assert problem == {"shard": "dataset.json", "expected": "4 units", "found": "3, without 00003"}


def test_a_manifest_of_another_dataset_is_a_problem(damaged: Path) -> None:
    (damaged / "manifest.parquet").write_bytes(b"PAR1")
    assert verify(damaged)["problems"][0]["shard"] == "manifest.parquet"


def test_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dataset"):
        verify(tmp_path)
