"""The conditions to sample: those that are given, or the trained classes; checked by the pipeline's class alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import ModularPipeline

from stages.adapters import GuidanceAdapter
from stages.base.pictures import PicturePath, check_pictures
from stages.base.prompts import check_columns, read_prompts
from stages.base.sampling import Condition, takes_class_labels
from stages.errors import UserError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.sizes import at_size


def read_conditions(config: EvaluateConfig, kind: type, adapter: GuidanceAdapter) -> list[Condition]:
    """The conditions of an evaluation: the classes, or the prompts; either all prompts have a class or none has.

    Args:
        kind: the pipeline's class.

    Raises:
        UserError: they are missing, cannot be read, or are not what the pipeline takes.
    """
    prompts = config.prompts
    scores = next((key for key in ("clip_model", "preference") if getattr(config, key)), None)
    if prompts is None or takes_class_labels(kind):
        if scores and takes_class_labels(kind):
            raise UserError(f"{scores}: {kind.__name__} takes classes, and the score needs prompts: leave it out")
        return at_size(conditions_of(kind, adapter, None, [prompts] if prompts else []), config.size)
    rows = read_prompts(prompts)
    check_columns(rows, f"prompts={prompts}", kind)
    check_pictures(rows[: config.num_samples], f"prompts={prompts}", of_one_size=False)
    if scores and "prompt" not in rows[0]:
        raise UserError(f"{scores}: prompts={prompts} has no prompts, and the score needs them: leave it out")
    named = [row for row in rows if "class_label" in row]
    if named and len(named) < len(rows):
        raise UserError(
            f"prompts={prompts}: {len(rows) - len(named)} rows have no class_label: give it to all or to none"
        )
    return at_size(rows, config.size)


def conditions_of(
    kind: type,
    adapter: GuidanceAdapter,
    class_labels: list[int] | None,
    prompts: list[str],
    pictures: Mapping[str, list[str]] | None = None,
) -> list[Condition]:
    """The conditions to sample: the given prompts and pictures, or classes; by default all trained classes.

    Args:
        kind: the pipeline's class.
        pictures: paths by the name of the pipeline's argument, as many for each as there are prompts.

    Raises:
        UserError: prompts for a pipeline that takes classes, or the reverse, or a class that was not trained on.
    """
    given = {name: paths for name, paths in (pictures or {}).items() if paths}
    if not takes_class_labels(kind):
        takes_prompts = issubclass(kind, ModularPipeline) or "prompt" in inspect.signature(kind.__call__).parameters
        if not prompts and takes_prompts:
            raise UserError(f"prompts: not given: {kind.__name__} takes prompts, not classes: say prompts=...")
        columns: dict[str, list[Any]] = ({"prompt": prompts} if prompts else {}) | {
            name: [PicturePath(path) for path in paths] for name, paths in given.items()
        }
        if differing := [name for name, values in columns.items() if len(values) != len(next(iter(columns.values())))]:
            raise UserError(f"{differing[0]}: give as many as prompts")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        check_columns(rows or [{}], "prompts", kind)
        check_pictures(rows, "prompts", of_one_size=False)
        return rows
    if prompts or given:
        raise UserError(f"{next(iter(given), 'prompts')}: {kind.__name__} takes classes: say class_labels=[...]")
    trained = list(adapter.metadata.sampled["class_labels"])
    labels = trained if class_labels is None else list(class_labels)
    if not labels or not set(labels) <= set(trained):
        known = f"{trained[0]} to {trained[-1]}" if len(trained) == trained[-1] - trained[0] + 1 else str(trained)
        raise UserError(f"class_labels={labels}: name classes that the adapter was trained on: {known}")
    return [{"class_label": label} for label in labels]
