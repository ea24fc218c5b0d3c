"""The driver sends uncommitted units to a fleet of workers and publishes the dataset once all are committed."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from stages.base.loading import first_line
from stages.base.pictures import check_pictures
from stages.configuration.options import to_yaml
from stages.errors import ChangedError, DamageError, StorageError, UsageError, UserError
from stages.generate.compatibility import (
    check_same_config,
    check_still_same,
    describe_plan,
    differences,
    gone,
    is_all_of,
)
from stages.generate.conditions import makes_images_of_their_size
from stages.generate.config import GenerateConfig
from stages.generate.events import EVALUATIONS, Event, Failed, Fleet, Loaded, Made
from stages.generate.plan import Plan
from stages.generate.preview import write_preview_grid
from stages.generate.profile import Profile
from stages.generate.progress_reporter import ProgressReporter
from stages.generate.unit import Unit
from stages.records.commits import commit_name, committed_units, is_committed, read_commit, read_commits
from stages.records.manifest import column_mismatch
from stages.records.plans import digest_of_unit, plan_digests, published, read_info
from stages.records.publication import begin_plan, publish, withdraw
from stages.records.schema import DatasetInfo, PlanEntry
from stages.records.teacher import PLACE_OF_TEACHER, TeacherFacts
from stages.storage.fields import read_fields
from stages.storage.files import to_json
from stages.storage.folder import open_folder
from stages.storage.hub import HUB

MAX_ATTEMPTS = 3
POLL_SECONDS = 1.0


class Driver:
    """One run of generation into an output folder. Several drivers may share it; none repeats a committed unit.

    Attributes:
        info: the content of `dataset.json`; None before the first plan is described.
        todo: the numbers of units to make.

    Raises:
        UserError: the folder is not writable, or holds a dataset of another configuration; at the end, units are
            missing.
    """

    def __init__(self, config: GenerateConfig) -> None:
        if config.output_dir.startswith(HUB):
            raise UsageError(
                f"output_dir={config.output_dir}: a dataset on the hub is only read: take a folder or a bucket, and "
                "`python -m pipeline.publish` uploads a folder"
            )
        self.config = config
        self.root = open_folder(config.output_dir)
        self.info, self.committed = self._look()
        self.plan = Plan(config, published(self.info))
        if self.committed and self.info is None:
            raise UserError(
                f"{self.root}: holds commits but no dataset.json to say of what: restore it, or take another output_dir"
            )
        if self.info is not None:
            check_same_config(self.root, self.info.plans[-1], self.plan)
            if len(self.plan) == units_of(self.info.plans) and not is_all_of(self.info.plans, self.plan):
                raise UserError(
                    f"{self.root}: more prompts or classes than it holds, for no more trajectories: raise their number"
                )
        todo = [unit for unit in range(len(self.plan)) if unit not in self.committed]
        if todo:
            of_one_size = makes_images_of_their_size(config.teacher)
            check_pictures(self.plan.conditions, f"prompts={config.prompts}", of_one_size)
        random.Random().shuffle(todo)  # so that drivers of one folder seldom make the same unit at the same time
        self.todo = deque(todo)
        if not self.finished:
            check_recordable(self.plan)
            self.root.probe()
        self.in_flight: set[int] = set()
        self.begun = False
        self.digests: list[tuple[int, str]] = []  # of the plans in `info`, once this run has begun
        self.attempts: Counter[int | None] = Counter()
        self.quarantined: dict[int, str] = {}
        self.refusals = 0
        self.records_made = 0
        self.profile = Profile()

    def _look(self) -> tuple[DatasetInfo | None, set[int]]:
        """Read dataset.json and the committed units; ignore a plan that was never started."""
        info, committed = read_info(self.root), set(committed_units(self.root))
        earlier = published(info)
        if info is not None and max(committed, default=-1) < units_of(earlier):
            info = replace(info, plans=earlier) if earlier else None
        return info, committed

    @property
    def finished(self) -> bool:
        """Whether earlier runs have made and published everything."""
        if self.todo or self.info is None or not self.info.complete:
            return False
        return self.described and published(self.info) == self.info.plans

    @property
    def described(self) -> bool:
        """Whether `dataset.json` describes the whole plan."""
        return self.info is not None and is_all_of(self.info.plans, self.plan)

    def run(self, fleet: Fleet) -> dict[str, Any]:
        """Make the missing units and publish the dataset.

        Returns:
            The content of `generation.json`; `info` then describes the whole dataset.
        """
        start = time.monotonic()
        try:
            self._drive(fleet)
        except BaseException:
            with suppress(StorageError):  # the first error counts: storage that refused a shard refuses this file too
                self._end(fleet, start)
            raise
        summary = self._end(fleet, start)
        if self.quarantined:
            unit, reason = next(iter(self.quarantined.items()))
            raise UserError(
                f"{self.root}: {len(self.quarantined)} of {len(self.plan)} units are missing after {MAX_ATTEMPTS} attempts each; "
                f"unit {unit}: {reason}; the same command tries them again"
            )
        self._publish()
        write_preview_grid(self.root)
        return summary

    def _publish(self) -> None:
        """Publish, unless another driver has published this plan and a larger one since."""
        there = read_info(self.root)
        if there is None:
            raise gone(self.root)
        if not self._begins(there):
            raise ChangedError(
                f"{self.root}: was begun anew by another run with another configuration, and is that one's now: take another output_dir"
            )
        assert self.info is not None
        grown = len(there.plans) > len(self.info.plans)
        self.info = there if grown else publish(self.root, there, read_commits(self.root))

    def _begins(self, described: DatasetInfo | None) -> bool:
        """Whether a description begins with this run's plans; another run may have added more."""
        if described is None or self.info is None:
            return False
        own = plan_digests(self.info)
        return plan_digests(described)[: len(own)] == own

    def _end(self, fleet: Fleet, start: float) -> dict[str, Any]:
        summary = self._summary(time.monotonic() - start)
        fleet.close()
        if self.info is not None and (self.begun or not self.todo):
            self.root.write("generation.json", to_json(summary))
        return summary

    def _drive(self, fleet: Fleet) -> None:
        reporter = ProgressReporter(self.plan, (len(self.committed), sum(map(self.plan.records_of, self.committed))))
        fleet.start(self.plan.examples)
        try:
            while self.todo or self.in_flight or not self.described:
                self._dispatch(fleet)
                for event in fleet.poll(POLL_SECONDS):
                    reporter.see(event, fleet.states())
                    self.profile.see(event)
                    self._see(event)
                reporter.tick(fleet.states())
        finally:
            reporter.close()

    def _dispatch(self, fleet: Fleet) -> None:
        """A unit that failed before gets a worker of its own: if it kills the worker, no other unit is lost."""
        while self.todo and fleet.free(alone := self.attempts[self.todo[0]] > 0):
            index = self.todo.popleft()
            if is_committed(self.root, index):
                self.committed.add(index)  # another driver was faster
            else:
                fleet.dispatch(self._unit(index), alone)
                self.in_flight.add(index)

    def _unit(self, index: int) -> Unit:
        return replace(self.plan.unit(index), plan=digest_of_unit(self.digests, index))

    def _see(self, event: Event) -> None:
        match event:
            case Loaded():
                self.attempts[None] = 0
                self._see_facts(event.facts)
            case Made():
                self._check_room(event)
                self._see_made(event.unit)
            case Failed(unit=None):
                self._see_no_worker(event)
            case Failed(unit=int(unit)):
                self._see_failure(event, unit)

    def _check_room(self, made: Made) -> None:
        """Once a record's size is known, warn of a disk that cannot hold all records."""
        if self.records_made or (free := self.root.free()) is None:
            return
        with suppress(DamageError):
            size = read_commit(self.root, commit_name(made.unit)).size / made.records
            self._warn_of_a_small_disk(size, free, made.records)

    def _warn_of_a_small_disk(self, size: float, free: int, made: int) -> None:
        left = size * (self.plan.num_records - sum(map(self.plan.records_of, self.committed)) - made)
        if left > free:
            message = f"about {left / 1e6:,.1f} MB are still to be made, and {free / 1e6:,.1f} MB are free there"
            warnings.warn(f"{self.root}: {message}: make room, or this run ends with what fits", stacklevel=1)

    def _see_made(self, unit: int) -> None:
        self.in_flight.remove(unit)
        self.committed.add(unit)
        self.records_made += self.plan.records_of(unit)
        self.refusals = 0

    def _see_facts(self, reported: dict[str, Any]) -> None:
        place = {PLACE_OF_TEACHER: self.config.teacher.pretrained_model_name_or_path}
        teacher = read_fields(TeacherFacts, reported | place)
        if not self.begun:
            self._look_again()
        info = self.info or DatasetInfo(complete=False, teacher=teacher)
        for key, found, value in differences(info.teacher, teacher):
            raise UserError(
                f"{self.root}: begun with another teacher: its {key} was {found}, not {value}: give the old teacher, or "
                "another output_dir"
            )
        if not self.begun:
            self._begin(info, reported.get(EVALUATIONS))

    def _look_again(self) -> None:
        """Take over what another driver described or made while the teacher was loading."""
        info, committed = self._look()
        if info is not None:
            check_same_config(self.root, info.plans[-1], self.plan)
        if len(published(info)) > len(published(self.info)) and not is_all_of(published(info), self.plan):
            raise ChangedError(f"{self.root}: has grown since this run began: give the command again")
        self.info, self.committed = info, committed
        self.todo = deque(unit for unit in self.todo if unit not in committed)

    def _begin(self, info: DatasetInfo, evaluations: int | None) -> None:
        """Describe the plan in `dataset.json`, unless an earlier run or another driver has."""
        if info.complete and self.todo and min(self.todo) < units_of(published(info)):
            info = withdraw(self.root, info)
        if units_of(info.plans) < len(self.plan):
            rule = info.teacher.guidance_rule
            info = begin_plan(self.root, info, describe_plan(self.plan, info.plans, rule, evaluations))
        self.root.write("config.yaml", to_yaml(self.config).encode())
        self.info, self.digests, self.begun = info, plan_digests(info), True

    def _see_no_worker(self, failure: Failed) -> None:
        if failure.ends_run:
            raise failure.error
        self.attempts[None] += 0 if failure.preempted else 1
        if self.attempts[None] >= MAX_ATTEMPTS and not self.profile.since:
            raise UserError(f"no worker could load the teacher in {MAX_ATTEMPTS} attempts: {reason_of(failure.error)}")

    def _see_failure(self, failure: Failed, unit: int) -> None:
        if isinstance(failure.error, ChangedError) and not self._begins(there := read_info(self.root)):
            assert self.info is not None
            check_still_same(self.root, there, self.plan, self.info.teacher)  # names what differs
            raise failure.error
        if is_committed(self.root, unit):  # the worker was lost after its commit, or another driver committed first
            self._see_made(unit)
            return
        if isinstance(failure.error, ChangedError):
            raise failure.error
        self.in_flight.remove(unit)
        if isinstance(failure.error, StorageError):
            # One refusal may be that of one node's disk; several in a row mean that no worker can write.
            self.refusals += 1
            if self.refusals >= MAX_ATTEMPTS:
                raise StorageError(f"{failure.error}; once that is mended, the same command goes on")
        elif not failure.preempted:
            self.attempts[unit] += 1
        if self.attempts[unit] < MAX_ATTEMPTS:
            self.todo.append(unit)
            return
        self.quarantined[unit] = reason_of(failure.error)
        if not self.committed:
            raise UserError(f"no unit could be made in {MAX_ATTEMPTS} attempts: {self.quarantined[unit]}")

    def _summary(self, seconds: float) -> dict[str, Any]:
        committed = [unit for unit in self.committed if unit < len(self.plan)]
        missing = sorted(set(range(len(self.plan))) - self.committed)
        trajectories = sum(len(self.plan.trajectories_of(unit)) for unit in committed)
        counted = None if self.info is None else self.info.plans[-1].evaluations
        return {
            "trajectories": trajectories,
            "records": trajectories * self.plan.records_per_trajectory,
            "teacher_evaluations": trajectories * (counted or self.plan.evaluations_per_trajectory),
            "units_planned": len(self.plan),
            "units_committed": len(committed),
            "units_missing": missing,
            "units_quarantined": len(self.quarantined),
            "quarantined": self.quarantined,
            "seconds": seconds,
            "records_per_second": self.records_made / seconds,
        } | self.profile.summary()


def check_recordable(plan: Plan) -> None:
    """Check before any unit is made that the manifest can hold every prompt, class and seed.

    Raises:
        UserError: names the first that it cannot hold.
    """
    for column in ("prompt", "class_label", "seed"):
        if found := column_mismatch(column, [condition.get(column) for condition in plan.conditions]):
            place, why = found
            source = f"{plan.config.prompts}: row {place + 1}" if plan.config.prompts else "class_labels"
            raise UserError(
                f"{source}: {column}={plan.conditions[place][column]!r}: cannot be recorded: {why}: change it"
            )


def units_of(plans: Sequence[PlanEntry]) -> int:
    return sum(plan.units for plan in plans)


def reason_of(error: BaseException) -> str:
    """An error in one line; unless it is a `UserError`, its class comes first."""
    message = first_line(error)
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
