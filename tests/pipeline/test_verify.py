from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import pipeline.generate
from pipeline.command import parse
from pipeline.verify import VerifyConfig, main
from stages.config import to_yaml
from stages.errors import UserError
from stages.generate.config import GenerateConfig
from stages.generate.in_process import InProcessFleet
from tests.conftest import generate_config
from tests.damages import DAMAGES, commit_of
from tests.stages.generate.test_driver import assert_same_records


def test_what_is_in_a_dataset_is_told(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(VerifyConfig(str(damaged)))
    told = capsys.readouterr().out
    assert "12 trajectories, 48 records, 4 shards" in told
    assert told.splitlines()[-1] == "whole: nothing is missing or damaged"
    assert (damaged / "verification.json").exists()
    main(VerifyConfig(str(damaged), deep=False))
    told = capsys.readouterr().out
    assert "timestep" not in told
    assert told.splitlines()[-1] == "whole: nothing is missing or damaged; no shard was read"


def test_every_problem_is_listed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted((damaged / "shards").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(b"")
    with pytest.raises(UserError, match=f"2 problem.*`python -m pipeline.verify data_dir={damaged} repair=true`"):
        main(VerifyConfig(str(damaged)))
    told = capsys.readouterr().out
    assert f"shards/{shards[0].name}: expected" in told
    assert f"shards/{shards[1].name}: expected" in told


def test_what_a_repair_tells_last_finishes_the_dataset(
    damaged: Path,
    shared_dataset: Path,
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("stages.generate.fleet.RayFleet", InProcessFleet)
    damaged = damaged.rename(damaged.with_name("two words"))
    (damaged / "config.yaml").unlink()  # as of an older dataset
    shard = commit_of(damaged)["shard"]
    DAMAGES["a flipped bit in a payload"](damaged)
    DAMAGES["a missing manifest"](damaged)
    with pytest.raises(UserError, match="unfinished: expected 4 units, found 3, without 00001: run the command that"):
        main(VerifyConfig(str(damaged), repair=True))
    told = capsys.readouterr().out
    assert re.search(rf"  {shard}: expected SHA-256 \w+, found \w+: moved to quarantine/{shard}\n", told)
    found = json.loads((damaged / "verification.json").read_text())
    assert [line["shard"] for line in found["repaired"]] == ["commits/00001.json", shard]
    assert (found["ok"], found["trajectories"], len(found["problems"])) == (False, 9, 2)
    (damaged / "config.yaml").write_text(to_yaml(generate_config(tiny_teacher, "elsewhere")))
    with pytest.raises(UserError, match="makes the rest$") as caught:
        main(VerifyConfig(str(damaged)))
    words = shlex.split(re.search("`python -m pipeline.generate (.*)`", str(caught.value))[1])  # type: ignore[index]
    pipeline.generate.main(parse(GenerateConfig, words))
    main(VerifyConfig(str(damaged)))
    assert_same_records(damaged, shared_dataset)


def test_a_repair_that_leaves_nothing_to_make_ends_well(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / "manifest.parquet").unlink()
    (damaged / "shards" / "00001-0badcafe.tar").write_bytes(b"orphan")
    main(VerifyConfig(str(damaged), repair=True))
    told = capsys.readouterr().out
    assert "orphans of attempts that were ended: 1, 6 bytes: shards/00001-0badcafe.tar" in told
    assert "  manifest.parquet: expected SHA-256" in told
    assert "found no such file: manifests written again from the commits" in told
    found = json.loads((damaged / "verification.json").read_text())
    assert (found["ok"], found["problems"], found["orphans"]["count"]) == (True, [], 1)
    assert sum(bin["count"] for bin in found["histograms"]["timestep"]) == 48
    main(VerifyConfig(str(damaged), repair=True, grace=0))
    told = capsys.readouterr().out
    assert "orphans" not in told
    assert "shards/00001-0badcafe.tar: expected a commit record that names it, found none: removed: 6 bytes" in told


def test_a_grace_below_nothing_is_refused(damaged: Path) -> None:
    with pytest.raises(UserError, match="grace=-1: at least 0"):
        main(VerifyConfig(str(damaged), grace=-1))
