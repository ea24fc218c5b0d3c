"""What one worker does: load the teacher once, then make units, each a shard and its commit."""

from __future__ import annotations

from typing import Any

from stages.generate.config import GenerateConfig
from stages.generate.plan import Plan
from stages.generate.preview import write_preview
from stages.generate.teacher import Teacher
from stages.records.dataset import commit_unit, published, read_info
from stages.records.folder import open_folder


class UnitWorker:
    """The same on a Ray node as in the driver's own process; `load` comes before `make`."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config

    def load(self) -> dict[str, Any]:
        """Load the teacher and tell its facts."""
        self.root = open_folder(self.config.output_dir)
        self.plan = Plan(self.config, published(read_info(self.root)))
        self.teacher = Teacher(self.config, self.plan.conditions[0])
        return self.teacher.facts()

    def make(self, index: int) -> int:
        """Make one unit, commit it, and tell how many records it holds."""
        trajectories = self.teacher.run(self.plan.unit(index))
        parts = [part for trajectory in trajectories for part in trajectory.parts(self.config.records_per_sample)]
        while self.teacher.previews:
            write_preview(self.root, *self.teacher.previews.popitem())
        commit = commit_unit(self.root, index, parts)
        return sum(row["records"] for row in commit["samples"])
