"""The driver: sends the units that are not committed yet to a fleet of workers, and publishes the dataset when all are."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import OmegaConf

from stages.base import first_line
from stages.errors import StorageError, UserError
from stages.generate.config import EXECUTION_KEYS, GenerateConfig
from stages.generate.plan import Plan
from stages.generate.preview import write_preview_grid
from stages.progress import progress
from stages.records.dataset import begin_plan, publish, published, read_commits, read_info
from stages.records.folder import open_folder
from stages.records.storage import to_json
from stages.sampling import Condition

COUNTS = ("num_trajectories", "num_trajectories_per_condition")  # of which a dataset that is made may be asked for more
CONDITIONS = ("prompts", "class_labels")  # judged by what they name
MAX_ATTEMPTS = 3
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Loaded:
    """A worker has loaded its teacher and tells its facts."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A unit is committed."""

    unit: int
    records: int


@dataclass(frozen=True)
class Failed:
    """A worker failed at a unit, or at loading where `unit` is None; `preempted` if its node went away."""

    unit: int | None
    error: BaseException
    preempted: bool = False


class Fleet(Protocol):
    """Workers, wherever they run; each makes one unit at a time."""

    def idle(self) -> int:
        """How many workers are loaded and have nothing to do."""

    def dispatch(self, unit: int) -> None:
        """Give a unit to an idle worker."""

    def poll(self, timeout: float) -> list[Loaded | Made | Failed]:
        """What happened since the last call; waits at most `timeout` seconds for it."""

    def close(self) -> None:
        """Stop every worker."""


class Driver:
    """One run of generation over one output folder.

    Raises:
        UserError: the folder holds a dataset of another configuration, or units are missing at the end.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.root = open_folder(config.output_dir)
        self.info = read_info(self.root)
        earlier = published(self.info)
        self.plan = Plan(config, earlier)
        self.committed = {unit: commit["samples"] for unit, commit in read_commits(self.root).items()}
        if self.info is not None and max(self.committed, default=-1) < sum(plan["units"] for plan in earlier):
            # What an earlier run described and never began.
            self.info = self.info | {"plans": earlier} if earlier else None
        if self.committed and self.info is None:
            raise UserError(
                f"{self.root}: holds commits but no dataset.json to say of what: restore it, or take another output_dir"
            )
        if self.info is not None:
            self._check_same_config(self.info["plans"][-1])
        self.todo = deque(unit for unit in range(len(self.plan)) if unit not in self.committed)
        self.attempts: Counter[int | None] = Counter()
        self.quarantined: dict[int, str] = {}
        self.in_flight = 0
        self.records_made = 0

    @property
    def finished(self) -> bool:
        """Whether an earlier run left nothing to do."""
        return not self.todo and self.info is not None and published(self.info) == self.info["plans"]

    def run(self, fleet: Fleet) -> dict[str, Any]:
        """Make what is missing and publish; the content of `generation.json`."""
        start = time.monotonic()
        try:
            self._drive(fleet)
        finally:
            fleet.close()
            summary = self._summary(time.monotonic() - start)
            if self.info is not None:
                self.root.write("generation.json", to_json(summary))
        if self.quarantined:
            unit, reason = next(iter(self.quarantined.items()))
            raise UserError(
                f"{self.root}: {len(self.quarantined)} of {len(self.plan)} units are missing after {MAX_ATTEMPTS} attempts each; "
                f"unit {unit}: {reason}; the same command tries them again"
            )
        assert self.info is not None
        commits = read_commits(self.root)
        write_preview_grid(self.root)
        publish(self.root, self.info, [commits[unit] for unit in range(len(self.plan))])
        return summary

    def _drive(self, fleet: Fleet) -> None:
        total = self.plan.num_trajectories * self.plan.records_per_trajectory
        done = sum(row["records"] for rows in self.committed.values() for row in rows)
        with progress(total, "generate", "records", initial=done) as bar:
            while self.todo or self.in_flight:
                while self.todo and fleet.idle():
                    fleet.dispatch(self.todo.popleft())
                    self.in_flight += 1
                for event in fleet.poll(POLL_SECONDS):
                    match event:
                        case Loaded():
                            self.attempts[None] = 0
                            self._see_facts(event.facts)
                        case Made():
                            self.in_flight -= 1
                            self.records_made += event.records
                            bar.update(event.records)
                        case Failed():
                            self._see_failure(event)

    def _see_facts(self, facts: dict[str, Any]) -> None:
        facts = facts | {"pretrained_model_name_or_path": self.config.teacher.pretrained_model_name_or_path}
        if self.info is None:
            self.info = {"complete": False, "teacher": facts, "plans": []}
        for key, value in facts.items():
            if self.info["teacher"][key] != value:
                raise UserError(
                    f"{self.root}: begun with another teacher: its {key} was {self.info['teacher'][key]}, not {value}: "
                    "give the old teacher, or another output_dir"
                )
        begun = self.info["plans"]
        if units := len(self.plan) - sum(plan["units"] for plan in begun):
            plan = {
                "units": units,
                "trajectories": self.plan.num_trajectories - sum(plan["trajectories"] for plan in begun),
                "guidance": {"rule": facts["guidance_rule"], "scale_range": self.plan.scale_range},
                "conditions": describe_conditions(self.plan.conditions),
                "config": defining(self.config),
            }
            self.info = begin_plan(self.root, self.info, plan)

    def _see_failure(self, failure: Failed) -> None:
        if isinstance(failure.error, StorageError):
            raise StorageError(f"{failure.error}; once that is mended, the same command goes on")
        if failure.unit is None and isinstance(failure.error, UserError):
            raise failure.error
        self.attempts[failure.unit] += 0 if failure.preempted else 1
        reason = first_line(failure.error)
        if not isinstance(failure.error, UserError):
            reason = f"{type(failure.error).__name__}: {reason}"
        exhausted = self.attempts[failure.unit] >= MAX_ATTEMPTS
        if failure.unit is None:
            if exhausted and not self.in_flight:
                raise UserError(f"no worker could load the teacher in {MAX_ATTEMPTS} attempts: {reason}")
            return
        self.in_flight -= 1
        if not exhausted:
            self.todo.append(failure.unit)
            return
        self.quarantined[failure.unit] = reason
        if not self.committed and not self.records_made:
            raise UserError(f"no unit could be made in {MAX_ATTEMPTS} attempts: {reason}")

    def _check_same_config(self, plan: dict[str, Any]) -> None:
        """Refuse another configuration than a plan's, but for one that asks for more once the plan was made to its end."""
        known = flatten(defining(GenerateConfig()))  # an older version's dataset lacks the options that came later
        old, new = known | flatten(plan["config"]), flatten(defining(self.config))
        made, told = "manifest_sha256" in plan, plan["conditions"]
        count = told.get("count", len(self.plan.conditions))
        goes_on = digest(self.plan.conditions[:count]) == told.get("sha256") and (
            made or count == len(self.plan.conditions)
        )
        for key in sorted(old.keys() | new.keys()):
            if key in COUNTS and made and None not in (old[key], new[key]) and old[key] < new[key]:
                continue
            if old.get(key) != new.get(key) and not (key in CONDITIONS and goes_on):
                raise UserError(
                    f"{self.root}: holds a dataset of another configuration: {key}={old.get(key)}, not {new.get(key)}: "
                    "take the old value, or another output_dir"
                )
        if "sha256" in told and not goes_on:
            key = "class_labels" if self.config.prompts is None else "prompts"
            raise UserError(
                f"{self.root}: holds a dataset of other {key}: {key}={new[key]} no longer names {'first ' if made else ''}the "
                f"{count} that it was made of: restore them, or take another output_dir"
            )

    def _summary(self, seconds: float) -> dict[str, Any]:
        commits = read_commits(self.root)
        rows = [row for commit in commits.values() for row in commit["samples"]]
        return {
            "trajectories": len({row["trajectory"] for row in rows}),
            "records": sum(row["records"] for row in rows),
            "bytes": sum(commit["size"] for commit in commits.values()),
            "units_planned": len(self.plan),
            "units_committed": len(commits),
            "units_quarantined": len(self.quarantined),
            "quarantined": self.quarantined,
            "seconds": seconds,
            "records_per_second": self.records_made / seconds,
        }


def describe_conditions(conditions: list[Condition]) -> dict[str, Any]:
    """What `dataset.json` tells of what was sampled: the classes, how many prompts, and what tells the list from any other."""
    labels = sorted({condition["class_label"] for condition in conditions if "class_label" in condition})
    prompts = {condition["prompt"] for condition in conditions if "prompt" in condition}
    negative = {condition["negative_prompt"] for condition in conditions if "negative_prompt" in condition}
    return {
        "class_labels": labels,
        "prompts": len(prompts),
        "negative_prompts": len(negative),
        "count": len(conditions),
        "sha256": digest(conditions),
    }


def digest(conditions: list[Condition]) -> str:
    """SHA-256 of a list of conditions."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()


def defining(config: GenerateConfig) -> dict[str, Any]:
    """The part of a configuration that decides what the dataset holds."""
    resolved = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if key not in EXECUTION_KEYS}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`: keys as they are given on the command line."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
