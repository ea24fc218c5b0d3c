"""What one worker does: load the teacher once, then make units, each a shard and its commit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stages.generate.compatibility import check_still_same
from stages.generate.config import GenerateConfig
from stages.generate.plan import Plan
from stages.generate.preview import write_preview
from stages.generate.profile import ENCODING, WRITING, Clock
from stages.generate.teacher import Teacher
from stages.records.commits import commit_unit
from stages.records.fields import read_fields
from stages.records.plans import plan_digests, published, read_info
from stages.records.shard import encode
from stages.records.teacher import TeacherFacts
from stages.records.trajectory import Trajectory
from stages.storage.folder import open_folder


@dataclass
class Sampled:
    """A unit that the teacher is done with."""

    trajectories: list[Trajectory]
    previews: dict[int, Tensor]
    clock: Clock


class UnitWorker:
    """The same on a Ray node as in the driver's own process; `load` comes first.

    A unit is `sample`d, then `commit`ted; the next may be sampled meanwhile, in another thread.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.sampled: dict[int, Sampled] = {}
        self.checked: list[tuple[int, str]] | None = None

    def load(self) -> dict[str, Any]:
        """Load the teacher and tell its facts."""
        self.root = open_folder(self.config.output_dir)
        self.plan = Plan(self.config, published(read_info(self.root)))
        self.teacher = Teacher(self.config, self.plan.conditions[0])
        self.facts = as_json(self.teacher.facts())
        return self.facts

    def sample(self, index: int) -> None:
        """Run the teacher for one unit, and keep what it gave until `commit`."""
        self.teacher.clock = clock = Clock()
        trajectories = list(self.teacher.run(self.plan.unit(index)))
        previews, self.teacher.previews = self.teacher.previews, {}
        self.sampled[index] = Sampled(trajectories, previews, clock)

    def commit(self, index: int) -> tuple[int, dict[str, float]]:
        """Write a sampled unit's shard and commit it; how many records it holds, and the seconds spent on what.

        Raises:
            ChangedError: `dataset.json` tells of something else by now.
        """
        sampled = self.sampled.pop(index)
        clock = sampled.clock
        with clock.spent_on(ENCODING):
            size = self.config.records_per_sample
            samples = [encode(part) for trajectory in sampled.trajectories for part in trajectory.parts(size)]
            sampled.trajectories.clear()
        with clock.spent_on(WRITING):
            digest = self._digest_of_plan(index)
            for item in sampled.previews.items():
                write_preview(self.root, *item)
            commit = commit_unit(self.root, index, samples, digest)
        return sum(row["records"] for row in commit.samples), dict(clock)

    def _digest_of_plan(self, unit: int) -> str:
        """Of the plan that a unit belongs to, once that is known to be what this worker goes by."""
        info = read_info(self.root)
        digests = [] if info is None else plan_digests(info)
        if digests != self.checked:
            check_still_same(self.root, info, self.plan, read_fields(TeacherFacts, self.facts))
            self.checked = digests
        return next(digest for end, digest in digests if unit < end)


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as they are read back from `dataset.json`, so that they are compared with equals: lists where tuples or arrays were."""
    return json.loads(
        json.dumps(facts, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    )
