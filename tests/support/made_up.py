"""Descriptions of datasets that no teacher made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.records.commits import commit_unit
from stages.records.plans import plan_digests
from stages.records.publication import publish
from stages.records.schema import ConditionsSpec, DatasetInfo, GuidanceSpec, PlanEntry
from stages.records.shard import Sample
from stages.records.teacher import TeacherFacts
from stages.storage.fields import read_fields
from stages.storage.folder import open_folder

PLAN = "0" * 64  # the digest of no plan


def teacher_facts(**changes: Any) -> TeacherFacts:
    """Make up a teacher that guides in one call of a denoiser on a doubled batch."""
    facts = read_fields(TeacherFacts, json.loads(Path(__file__).with_name("teacher_facts.json").read_text()))
    return replace(facts, **changes)


def planned(units: int = 1, trajectories: int = 1, conditions: int = 1, **config: Any) -> PlanEntry:
    """Make up a plan that is under way."""
    return PlanEntry(
        units,
        trajectories,
        GuidanceSpec({"name": "none"}, [1.0, 1.0]),
        ConditionsSpec([], 0, 0, conditions, "0" * 64),
        {"teacher": {}} | config,
    )


def described(*plans: PlanEntry, **teacher: Any) -> DatasetInfo:
    """Make up a dataset of these plans."""
    return DatasetInfo(complete=False, teacher=teacher_facts(**teacher), plans=plans)


def write_dataset(root: Path, units: Sequence[Sequence[Sample]]) -> None:
    """Write and publish a dataset of one plan, from the samples of each unit."""
    folder, info = open_folder(root), described(planned(len(units)))
    ((_, digest),) = plan_digests(info)
    publish(folder, info, [commit_unit(folder, unit, samples, digest) for unit, samples in enumerate(units)])
