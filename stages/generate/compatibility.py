"""Whether a run's configuration goes on with the dataset that `dataset.json` describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from stages.base.loading import located
from stages.base.places import public
from stages.base.sampling import Condition
from stages.configuration.options import dotted
from stages.errors import ChangedError, UserError
from stages.generate.config import EXECUTION_KEYS, GenerateConfig
from stages.generate.plan import Plan
from stages.records.schema import ConditionsSpec, DatasetInfo, GuidanceSpec, PlanEntry, PublishedPlan
from stages.records.teacher import PLACE_OF_TEACHER, TeacherFacts

COUNTS = ("num_trajectories", "num_trajectories_per_condition")  # options that may rise once a dataset is published
PLACES = (PLACE_OF_TEACHER, "config")  # options of a teacher that say where its files are
CONDITIONS = ("prompts", "class_labels")  # options judged by the conditions that they name


def check_same_config(root: Any, entry: PlanEntry, plan: Plan) -> None:
    """Refuse a configuration that differs from a described plan's; a published plan may be extended.

    Args:
        root: the dataset's folder.
        entry: of `dataset.json`; plan: of this run.

    Raises:
        UserError: names the option that differs.
    """
    old, new = dotted(entry.config), dotted(defining(plan.config))
    made, count = isinstance(entry, PublishedPlan), entry.conditions.count
    goes_on = digest(plan.conditions[:count]) == entry.conditions.sha256 and (made or count == len(plan.conditions))
    for key in sorted(old.keys() | new.keys()):
        if key in COUNTS and made and None not in (old[key], new[key]) and old[key] < new[key]:
            continue
        if key.removeprefix("teacher.") in PLACES and is_same_place(old[key], new[key]):
            continue
        if old.get(key) != new.get(key) and not (key in CONDITIONS and goes_on):
            way_out = "finish that first" if key in COUNTS and not made else "take the old value"
            raise UserError(
                f"{root}: holds a dataset of another configuration: {key}={old.get(key)}, not {new.get(key)}: "
                f"{way_out}, or take another output_dir"
            )
    if not goes_on:
        key = "class_labels" if plan.config.prompts is None else "prompts"
        raise UserError(
            f"{root}: holds a dataset of other {key}: {key}={new[key]} no longer names {'first ' if made else ''}the "
            f"{count} that it was made of: restore them, or take another output_dir"
        )


def is_same_place(described: str | None, given: str | None) -> bool:
    """Whether a path may be the one of `dataset.json`, which has only its last name once published.

    The fingerprint of the weights decides, once they are loaded.
    """
    if described is None or given is None:
        return described == given
    return located(given) == located(described) or public(located(given)) == described


def check_still_same(root: Any, info: DatasetInfo | None, plan: Plan, teacher: TeacherFacts) -> None:
    """Refuse to go on where `dataset.json` no longer describes a run's plan, because another run has replaced it.

    Args:
        info: the content of `dataset.json`.
        plan: the run's; it may name another place of the same teacher.
        teacher: the teacher's facts when the run began.

    Raises:
        ChangedError: names what differs.
    """
    if info is None:
        raise gone(root)
    entry = info.plans[-1]
    places = {key: getattr(plan.config.teacher, key) for key in PLACES}
    config = entry.config | {"teacher": entry.config["teacher"] | places}
    try:
        check_same_config(root, replace(entry, config=config), plan)
    except UserError as error:
        raise ChangedError(str(error)) from error
    if not is_all_of(info.plans, plan):
        raise ChangedError(f"{root}: has grown since this run began: give the command again")
    for key, found, value in differences(info.teacher, teacher):
        raise ChangedError(f"{root}: was begun anew with another teacher: its {key} is {found}, not {value}")


def gone(root: Any) -> ChangedError:
    return ChangedError(f"{root}: dataset.json is gone: put it back, or take another output_dir")


def differences(described: TeacherFacts, loaded: TeacherFacts) -> Iterator[tuple[str, Any, Any]]:
    """(fact, as described, as loaded) for each fact in which two teachers differ, except where their files are."""
    for key, value in vars(loaded).items():
        if key not in PLACES and (found := getattr(described, key)) != value:
            yield key, found, value


def is_all_of(plans: Sequence[PlanEntry], plan: Plan) -> bool:
    """Whether the plans of `dataset.json` together make up a plan."""
    planned = [sum(entry.units for entry in plans), sum(entry.trajectories for entry in plans)]
    return planned == [len(plan), plan.num_trajectories] and plans[-1].conditions.count == len(plan.conditions)


def describe_plan(
    plan: Plan, begun: Sequence[PlanEntry], rule: dict[str, Any], evaluations: int | None = None
) -> PlanEntry:
    """The entry of `dataset.json` for what a plan adds to the plans before it.

    Args:
        evaluations: of the teacher's denoiser for one trajectory.
    """
    return PlanEntry(
        units=len(plan) - sum(entry.units for entry in begun),
        trajectories=plan.num_trajectories - sum(entry.trajectories for entry in begun),
        guidance=GuidanceSpec(rule, plan.scale_range),
        conditions=describe_conditions(plan.conditions),
        config=defining(plan.config),
        evaluations=evaluations,
    )


def describe_conditions(conditions: list[Condition]) -> ConditionsSpec:
    """The conditions as `dataset.json` describes them: classes, numbers of prompts, and a digest of the list."""
    labels = sorted({condition["class_label"] for condition in conditions if "class_label" in condition})
    prompts = {condition["prompt"] for condition in conditions if "prompt" in condition}
    negative = {condition["negative_prompt"] for condition in conditions if "negative_prompt" in condition}
    return ConditionsSpec(labels, len(prompts), len(negative), len(conditions), digest(conditions))


def digest(conditions: list[Condition]) -> str:
    """SHA-256 of a list of conditions."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()


def defining(config: GenerateConfig) -> dict[str, Any]:
    """The options that decide the dataset's content."""
    resolved = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if key not in EXECUTION_KEYS}
