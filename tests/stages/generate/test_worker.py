from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.errors import ChangedError
from stages.generate.compatibility import describe_plan
from stages.generate.plan import Plan
from stages.generate.profile import ENCODING, RECORDING, TEACHER, WRITING
from stages.generate.worker import UnitWorker
from stages.records.commits import read_commits
from stages.records.plans import plan_digests
from stages.records.publication import begin_plan
from stages.records.schema import DatasetInfo
from stages.records.teacher import TeacherFacts
from stages.storage.fields import read_fields
from stages.storage.folder import open_folder
from tests.conftest import generate_config


def describe(plan: Plan, facts: dict[str, Any]) -> str:
    """Write `dataset.json` for a loaded worker, as its driver would; return the plan's digest."""
    info = DatasetInfo(complete=False, teacher=read_fields(TeacherFacts, facts))
    root = open_folder(plan.config.output_dir)
    return plan_digests(begin_plan(root, info, describe_plan(plan, [], info.teacher.guidance_rule)))[0][1]


def test_a_worker_loads_once_and_commits_its_samples(tiny_teacher: Path, tmp_path: Path) -> None:
    config = generate_config(tiny_teacher, tmp_path, records_per_sample=3)
    worker, plan = UnitWorker(config), Plan(config)
    facts = worker.load(plan.examples)
    assert facts["denoiser_class"] == "DiTTransformer2DModel"
    digest = describe(plan, facts)
    for unit in (2, 1, 0):
        worker.sample(replace(plan.unit(unit), plan=digest if unit else "another"))
    with pytest.raises(ChangedError, match=r"dataset\.json no longer describes the plan of unit 0"):
        worker.commit(0)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ChangedError, match=r"dataset\.json is gone"):
        worker.commit(1)
    assert describe(plan, facts) == digest
    records, seconds = worker.commit(2)
    assert records == 12
    assert seconds.keys() == {TEACHER, RECORDING, ENCODING, WRITING}
    assert all(spent > 0 for spent in seconds.values())
    (commit,) = read_commits(open_folder(tmp_path))
    assert (commit.unit, commit.plan) == (2, digest)
    assert [row["records"] for row in commit.samples] == [3, 1] * 3
    assert [row["key"] for row in commit.samples][:2] == ["000000006_0000", "000000006_0001"]
