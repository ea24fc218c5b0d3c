"""What `dataset.json` tells of a run's configuration, and whether another run's goes on with it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import OmegaConf

from stages.base.loading import located
from stages.base.sampling import Condition
from stages.errors import ChangedError, UserError
from stages.generate.config import EXECUTION_KEYS, GenerateConfig
from stages.generate.plan import Plan
from stages.records.plans import PLACE_OF_TEACHER

COUNTS = ("num_trajectories", "num_trajectories_per_condition")  # of which a dataset that is made may be asked for more
CONDITIONS = ("prompts", "class_labels")  # judged by what they name


def check_same_config(root: Any, told_plan: dict[str, Any], plan: Plan) -> None:
    """Refuse another configuration than a plan's, but for one that asks for more once the plan was made to its end.

    Args:
        root: the dataset, by its address.
        told_plan: as `dataset.json` tells it; plan: what is asked for now.

    Raises:
        UserError: names the option that differs.
    """
    known = dotted(defining(GenerateConfig()))  # an older version's dataset lacks the options that came later
    old, new = known | dotted(told_plan["config"]), dotted(defining(plan.config))
    made, entry_conditions = "manifest_sha256" in told_plan, told_plan["conditions"]
    count = entry_conditions["count"]
    goes_on = digest(plan.conditions[:count]) == entry_conditions["sha256"] and (made or count == len(plan.conditions))
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


def check_still_same(root: Any, info: dict[str, Any] | None, plan: Plan, facts: dict[str, Any]) -> None:
    """Refuse to go on where `dataset.json` no longer tells of what a worker makes, because another run described something else.

    Args:
        info: as it is now; plan, facts: the worker's own, of which the place of the teacher is its own matter.

    Raises:
        ChangedError: names what differs.
    """
    if info is None:
        raise ChangedError(f"{root}: dataset.json is gone: put it back, or take another output_dir")
    entry = info["plans"][-1]
    here = defining(plan.config)  # where it is, the driver has judged
    config = entry["config"] | {
        "teacher": entry["config"]["teacher"] | {PLACE_OF_TEACHER: here["teacher"][PLACE_OF_TEACHER]}
    }
    try:
        check_same_config(root, entry | {"config": config}, plan)
    except UserError as error:
        raise ChangedError(str(error)) from error
    if not is_all_of(info["plans"], plan):
        raise ChangedError(f"{root}: has grown since this run began: give the command again")
    for key, value in facts.items():
        if key != PLACE_OF_TEACHER and info["teacher"].get(key) != value:
            raise ChangedError(
                f"{root}: was begun anew with another teacher: its {key} is {info['teacher'].get(key)}, not {value}"
            )


def is_all_of(plans: list[dict[str, Any]], plan: Plan) -> bool:
    """Whether plans that `dataset.json` tells of are, together, what is asked for."""
    planned = [sum(entry[key] for entry in plans) for key in ("units", "trajectories")]
    return planned == [len(plan), plan.num_trajectories] and plans[-1]["conditions"].get("count") in (
        None,
        len(plan.conditions),
    )


def describe_plan(plan: Plan, begun: list[dict[str, Any]], rule: str) -> dict[str, Any]:
    """What `dataset.json` tells of what a plan adds to those before it."""
    return {
        "units": len(plan) - sum(entry["units"] for entry in begun),
        "trajectories": plan.num_trajectories - sum(entry["trajectories"] for entry in begun),
        "guidance": {"rule": rule, "scale_range": plan.scale_range},
        "conditions": describe_conditions(plan.conditions),
        "config": defining(plan.config),
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


def dotted(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`: keys as they are given on the command line."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
