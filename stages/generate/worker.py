"""A worker's part of generation: load the teacher once, then make units, each a shard and its commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.base.sampling import Condition
from stages.errors import ChangedError
from stages.generate.compatibility import gone
from stages.generate.config import GenerateConfig
from stages.generate.events import EVALUATIONS
from stages.generate.preview import write_preview
from stages.generate.profile import ENCODING, WRITING
from stages.generate.teacher import Teacher, TeacherOutput
from stages.generate.unit import Unit
from stages.records.commits import commit_unit
from stages.records.plans import digest_of_unit, plan_digests, read_info
from stages.records.shard import encode
from stages.storage.folder import open_folder


@dataclass
class SampledUnit:
    """A unit that the teacher has sampled and that is not committed yet; `plan` is the digest of the unit's plan."""

    plan: str | None
    output: TeacherOutput


class UnitWorker:
    """The worker of every fleet, on a Ray node or in the driver's process. `load` comes first.

    Each unit is sampled, then committed; another thread may sample the next unit meanwhile.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.sampled: dict[int, SampledUnit] = {}

    def load(self, examples: Sequence[Condition]) -> dict[str, Any]:
        """Load the teacher and find out how it guides, with trial runs on a condition of each size.

        Returns:
            Its facts as JSON, and the number of its denoiser's evaluations for one trajectory.
        """
        self.root = open_folder(self.config.output_dir)
        self.teacher = Teacher(self.config, examples)
        return self.teacher.facts().to_json() | {EVALUATIONS: self.teacher.evaluations_per_trajectory}

    def sample(self, unit: Unit) -> None:
        """Run the teacher for a unit and keep its output until `commit`."""
        self.sampled[unit.index] = SampledUnit(unit.plan, self.teacher.run(unit))

    def commit(self, index: int) -> tuple[int, dict[str, float]]:
        """Write a sampled unit's shard and commit it.

        Returns:
            The number of records in the unit, and the seconds spent on it by activity.

        Raises:
            ChangedError: `dataset.json` no longer describes the unit's plan.
        """
        sampled = self.sampled.pop(index)
        output, clock = sampled.output, sampled.output.clock
        with clock.spent_on(ENCODING):
            size = self.config.records_per_sample
            samples = [encode(part) for trajectory in output.trajectories for part in trajectory.parts(size)]
            output.trajectories.clear()
        with clock.spent_on(WRITING):
            plan = self._described(index, sampled.plan)
            for number, image in output.previews.items():
                write_preview(self.root, number, image)
            commit = commit_unit(self.root, index, samples, plan, output.constants, output.decoder_input)
        return sum(row["records"] for row in commit.samples), dict(clock)

    def _described(self, index: int, plan: str | None) -> str:
        """The digest of the unit's plan, once `dataset.json` is known to describe that plan."""
        info = read_info(self.root)
        if info is None:
            raise gone(self.root)
        if plan is None or digest_of_unit(plan_digests(info), index) != plan:
            raise ChangedError(f"{self.root}: dataset.json no longer describes the plan of unit {index}")
        return plan
