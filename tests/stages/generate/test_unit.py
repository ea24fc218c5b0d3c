from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import ChangedError
from stages.generate.compatibility import describe_plan
from stages.generate.profile import ENCODING, RECORDING, TEACHER, WRITING
from stages.generate.unit import UnitWorker
from stages.records.commits import read_commits
from stages.records.fields import read_fields
from stages.records.plans import plan_digests
from stages.records.publication import begin_plan
from stages.records.schema import DatasetInfo
from stages.records.teacher import TeacherFacts
from stages.storage.folder import open_folder
from tests.conftest import generate_config


def describe(worker: UnitWorker) -> DatasetInfo:
    """Describe what a loaded worker is to make, as its driver would."""
    info = DatasetInfo(complete=False, teacher=read_fields(TeacherFacts, worker.facts))
    return begin_plan(worker.root, info, describe_plan(worker.plan, [], worker.facts["guidance_rule"]))


def test_a_worker_loads_once_and_commits_what_it_sampled(tiny_teacher: Path, tmp_path: Path) -> None:
    worker = UnitWorker(generate_config(tiny_teacher, tmp_path, records_per_sample=3))
    assert worker.load()["denoiser_class"] == "DiTTransformer2DModel"
    worker.sample(2)
    worker.sample(1)
    worker.sample(0)
    with pytest.raises(ChangedError, match=r"dataset\.json is gone"):
        worker.commit(0)
    info = describe(worker)
    records, seconds = worker.commit(2)
    assert records == 12
    assert seconds.keys() == {TEACHER, RECORDING, ENCODING, WRITING}
    assert all(spent > 0 for spent in seconds.values())
    (commit,) = read_commits(open_folder(tmp_path))
    assert (commit.unit, commit.plan) == (2, plan_digests(info)[0][1])
    assert [row["records"] for row in commit.samples] == [3, 1] * 3
    assert [row["key"] for row in commit.samples][:2] == ["000000006_0000", "000000006_0001"]
