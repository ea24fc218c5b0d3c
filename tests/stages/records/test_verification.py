from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.generate.driver import Driver
from stages.records.dataset import Dataset
from stages.records.verification import verify
from stages.storage.disk import DiskFolder
from stages.storage.sealing import seal, unseal
from tests.conftest import generate, generate_config
from tests.stages.generate.test_driver import Faulty
from tests.stages.records.test_plans import change_info


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
    change_info(damaged, complete=False)
    (damaged / "commits" / "00003.json").unlink()
    (problem,) = verify(damaged)["problems"]
    assert problem == {"shard": "dataset.json", "expected": "4 units", "found": "3, without 00003"}


def test_a_manifest_of_another_dataset_is_a_problem(damaged: Path) -> None:
    (damaged / "manifest.parquet").write_bytes(b"PAR1")
    assert verify(damaged)["problems"][0]["shard"] == "manifest.parquet"


def test_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dataset"):
        verify(tmp_path)


def test_damaged_and_foreign_commits_are_each_a_problem(damaged: Path) -> None:
    commits = sorted((damaged / "commits").iterdir())
    commits[0].write_text(commits[0].read_text().replace('"class_label": 0', '"class_label": 7'))
    (damaged / "commits" / "00007.json").write_bytes(commits[1].read_bytes())
    beyond = {**unseal(commits[1].read_bytes()), "unit": 99999, "shard": "shards/99999-1a2b3c4d.tar"}
    (damaged / "commits" / "99999.json").write_bytes(seal(beyond))
    found = verify(damaged)
    assert [problem["shard"] for problem in found["problems"]] == [
        "commits/00000.json",
        "commits/00007.json",
        "commits/99999.json",
        "dataset.json",
    ]
    assert found["problems"][-2]["expected"] == "one of the 4 planned units"
    assert found["problems"][-1]["found"] == "3, without 00000"


def test_a_manifest_that_differs_from_the_commits_is_a_problem(damaged: Path) -> None:
    """The shard shows which of the two is right."""
    path = damaged / "commits" / "00001.json"
    commit = unseal(path.read_bytes())
    commit["samples"][2]["scale"] = 9.0
    path.write_bytes(seal(commit))
    (problem,) = verify(damaged, deep=False)["problems"]
    assert problem["shard"] == commit["shard"]
    assert "000000005_0000 in the manifest as in its commit" in problem["expected"]
    (_, problem) = verify(damaged)["problems"]
    assert (problem["shard"], problem["expected"]) == (commit["shard"], "scale 9.0 of 000000005_0000")


def test_the_manifest_of_every_snapshot_is_checked(damaged: Path, tiny_teacher: Path) -> None:
    generate(generate_config(tiny_teacher, damaged, num_trajectories=14))
    assert verify(damaged)["ok"]
    (damaged / "manifests" / "1.parquet").write_bytes(b"PAR1")
    found = verify(damaged)
    assert [problem["shard"] for problem in found["problems"]] == ["manifests/1.parquet"]
    assert found["trajectories"] == 14


def test_without_depth_no_shard_is_read(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, short, flipped, _ = shards(damaged)
    (damaged / missing).unlink()
    (damaged / short).write_bytes((damaged / short).read_bytes()[:-512])
    content = bytearray((damaged / flipped).read_bytes())
    content[700] ^= 1
    (damaged / flipped).write_bytes(content)
    assert [problem["shard"] for problem in verify(damaged)["problems"]] == [missing, short, flipped]
    monkeypatch.setattr(DiskFolder, "open", None)
    found = verify(damaged, deep=False)
    assert [problem["shard"] for problem in found["problems"]] == [missing, short]
    assert found["histograms"].keys() == {"scale", "class_label"}
    assert not found["deep"]


def test_units_of_a_plan_under_way_are_checked_too(damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=20)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    found = verify(damaged)
    assert (found["ok"], found["shards"], found["orphans"]["count"]) == (True, 4, 0)
    assert found["growth"] == {"units_planned": 3, "units_committed": 1}
    (shard,) = damaged.glob("shards/0000[456]-*.tar")
    shard.write_bytes(b"")
    assert [problem["shard"] for problem in verify(damaged)["problems"]] == [f"shards/{shard.name}"]
