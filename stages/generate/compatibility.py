"""What `dataset.json` tells of a run's configuration, and whether another run's goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from stages.base.loading import located
from stages.base.sampling import Condition
from stages.errors import ChangedError, UserError
from stages.generate.config import EXECUTION_KEYS, GenerateConfig
from stages.generate.plan import Plan
from stages.records.schema import ConditionsSpec, DatasetInfo, GuidanceSpec, PlanEntry, PublishedPlan
from stages.records.teacher import PLACE_OF_TEACHER, TeacherFacts

COUNTS = ("num_trajectories", "num_trajectories_per_condition")  # of which a dataset that is made may be asked for more
CONDITIONS = ("prompts", "class_labels")  # judged by what they name


def check_same_config(root: Any, entry: PlanEntry, plan: Plan) -> None:
    """Refuse another configuration than a plan's, but for one that asks for more once the plan was made to its end.

    Args:
        root: the dataset, by its address.
        entry: of `dataset.json`; plan: what is asked for now.

    Raises:
        UserError: names the option that differs.
    """
    old, new = dotted(entry.config), dotted(defining(plan.config))
    made, count = isinstance(entry, PublishedPlan), entry.conditions.count
    goes_on = digest(plan.conditions[:count]) == entry.conditions.sha256 and (made or count == len(plan.conditions))
    for key in sorted(old.keys() | new.keys()):
        if key in COUNTS and made and None not in (old[key], new[key]) and old[key] < new[key]:
            continue
        if key == f"teacher.{PLACE_OF_TEACHER}" and located(old[key]) == located(new[key]):
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


def check_still_same(root: Any, info: DatasetInfo | None, plan: Plan, facts: TeacherFacts) -> None:
    """Refuse to go on where `dataset.json` no longer tells of what a worker makes, because another run described something else.

    Args:
        info: as it is now; plan, facts: the worker's own, of which the place of the teacher is its own matter.

    Raises:
        ChangedError: names what differs.
    """
    if info is None:
        raise ChangedError(f"{root}: dataset.json is gone: put it back, or take another output_dir")
    entry = info.plans[-1]
    here = defining(plan.config)  # where it is, the driver has judged
    config = entry.config | {"teacher": entry.config["teacher"] | {PLACE_OF_TEACHER: here["teacher"][PLACE_OF_TEACHER]}}
    try:
        check_same_config(root, replace(entry, config=config), plan)
    except UserError as error:
        raise ChangedError(str(error)) from error
    if not is_all_of(info.plans, plan):
        raise ChangedError(f"{root}: has grown since this run began: give the command again")
    for key, found, value in differences(info.teacher, facts):
        raise ChangedError(f"{root}: was begun anew with another teacher: its {key} is {found}, not {value}")


def differences(described: TeacherFacts, loaded: TeacherFacts) -> Iterator[tuple[str, Any, Any]]:
    """(fact, as described, as loaded) where two teachers differ; the place where they are found is none."""
    for key, value in vars(loaded).items():
        if key != PLACE_OF_TEACHER and (found := getattr(described, key)) != value:
            yield key, found, value


def is_all_of(plans: Sequence[PlanEntry], plan: Plan) -> bool:
    """Whether plans of `dataset.json` are, together, what is asked for."""
    planned = [sum(entry.units for entry in plans), sum(entry.trajectories for entry in plans)]
    return planned == [len(plan), plan.num_trajectories] and plans[-1].conditions.count == len(plan.conditions)


def describe_plan(plan: Plan, begun: Sequence[PlanEntry], rule: dict[str, Any]) -> PlanEntry:
    """The entry in `dataset.json` of what a plan adds to those before it."""
    return PlanEntry(
        units=len(plan) - sum(entry.units for entry in begun),
        trajectories=plan.num_trajectories - sum(entry.trajectories for entry in begun),
        guidance=GuidanceSpec(rule, plan.scale_range),
        conditions=describe_conditions(plan.conditions),
        config=defining(plan.config),
    )


def describe_conditions(conditions: list[Condition]) -> ConditionsSpec:
    """The entry in `dataset.json` of what is sampled."""
    labels = sorted({condition["class_label"] for condition in conditions if "class_label" in condition})
    prompts = {condition["prompt"] for condition in conditions if "prompt" in condition}
    negative = {condition["negative_prompt"] for condition in conditions if "negative_prompt" in condition}
    return ConditionsSpec(labels, len(prompts), len(negative), len(conditions), digest(conditions))


def digest(conditions: list[Condition]) -> str:
    """SHA-256 of a list of conditions."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()


def defining(config: GenerateConfig) -> dict[str, Any]:
    """The part of a configuration that decides what the dataset holds."""
    resolved = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if key not in EXECUTION_KEYS}


def dotted(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`: keys as they are given on the command line."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
