"""The real command, killed and run twice at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray

import pipeline.generate
from stages.errors import UserError
from stages.records.commits import read_commits
from stages.storage.folder import open_folder
from tests.conftest import generate, generate_config
from tests.support.faults_table import survived
from tests.support.soak import check, kill_command, start_command, until, worker_processes

UNITS = 60


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_driver_is_followed_by_two_at_once(tiny_teacher: Path, tmp_path: Path) -> None:
    """Two drivers on one cluster, as after restarts by hand and by a scheduler."""
    config = generate_config(
        tiny_teacher, tmp_path / "data", num_trajectories=UNITS, trajectories_per_unit=1, num_inference_steps=20,
        ray_address=ray.get_runtime_context().gcs_address,
    )  # fmt: skip
    shards, commits = tmp_path / "data" / "shards", tmp_path / "data" / "commits"
    first = start_command(config, tmp_path / "first")
    until(lambda: commits.exists() and len(list(commits.glob("[0-9]*.json"))) >= 3)
    kill_command(first)
    until(lambda: worker_processes() == [])
    made = {commit.shard for commit in read_commits(open_folder(tmp_path / "data"))}
    assert 3 <= len(made) < UNITS
    left = {f"shards/{path.name}" for path in shards.glob("[0-9]*")} - made
    assert len(left) <= 2

    with pytest.raises(UserError, match="another configuration: seed=0, not 1"):
        pipeline.generate.main(replace(config, seed=1))
    survived("another configuration over a dataset: refused", "driver")

    both = [start_command(config, tmp_path / name) for name in ("second", "third")]
    try:
        assert [process.wait(240) for process in both] == [0, 0]
    finally:
        for process in both:
            kill_command(process)
    committed = {commit.shard for commit in read_commits(open_folder(tmp_path / "data"))}
    assert len(committed) == UNITS
    assert made < committed
    assert {f"shards/{path.name}" for path in shards.glob("[0-9]*")} - left == committed
    message = "".join((tmp_path / name).read_text() for name in ("second", "third"))
    assert UNITS - len(made) <= message.count(" records in ") < 1.5 * (UNITS - len(made)), "most units were made twice"
    check(tmp_path / "data", generate(replace(config, output_dir=str(tmp_path / "undisturbed"))))
    survived("SIGKILL of the driver in the middle", "driver")
    survived("two drivers at once on one dataset", "driver")


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_terminated_driver_reports_what_was_made(tiny_teacher: Path, tmp_path: Path) -> None:
    """The signal is SIGTERM, as schedulers send it; Ray's own handler would print a dump."""
    config = generate_config(
        tiny_teacher, tmp_path / "data", num_trajectories=9999, trajectories_per_unit=1, num_inference_steps=20,
        ray_address=ray.get_runtime_context().gcs_address,
    )  # fmt: skip
    process = start_command(config, tmp_path / "log")
    try:
        until(lambda: len(list((tmp_path / "data" / "commits").glob("[0-9]*.json"))) >= 3)
        process.terminate()
        assert process.wait(60) == 1
    finally:
        kill_command(process)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "error: interrupted; what was written before is kept"
    info = json.loads((tmp_path / "data" / "generation.json").read_text())
    assert 0 < info["units_committed"] <= len(list((tmp_path / "data" / "commits").glob("[0-9]*.json")))
    assert info["teacher_evaluations"] == 2 * info["records"]
    survived("SIGTERM of the driver", "driver")
