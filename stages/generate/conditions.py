"""The conditions to sample, prompts or classes, checked against the teacher's configuration without its weights."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import obstore
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from stages.base.denoiser import DENOISER_NAMES
from stages.base.loading import first_line, resolve
from stages.base.prompts import check_columns, read_prompts, read_text
from stages.base.sampling import Condition
from stages.base.single_file import check_file_of_weights, is_single_file
from stages.errors import UserError
from stages.generate.config import GenerateConfig, TeacherConfig

CLASS = re.compile(r"-?\d{1,18}", re.ASCII)


def read_conditions(config: GenerateConfig) -> list[Condition]:
    """Read the configured conditions and check that the teacher takes each, without its weights.

    Raises:
        UserError: a file is missing, empty or not readable, or the teacher does not take a condition.
    """
    if config.prompts is None:
        known = count_classes(config.teacher)
        return [{"class_label": label} for label in read_class_labels(config.class_labels, known)]
    prompts = read_prompts(config.prompts)
    check_columns(prompts, f"prompts={config.prompts}", pipeline_class_of(config.teacher))
    call, with_negative = dict(config.teacher.call), sum("negative_prompt" in prompt for prompt in prompts)
    if with_negative == len(prompts) and "negative_prompt" in call:
        raise UserError(
            f"teacher.call.negative_prompt: each row of prompts={config.prompts} has its own: leave one of them out"
        )
    if with_negative:  # then every prompt gets one, or a trajectory would depend on its batch
        prompts = [{"negative_prompt": call.get("negative_prompt", ""), **prompt} for prompt in prompts]
    return prompts


def makes_images_of_their_size(teacher: TeacherConfig) -> bool:
    """Whether a teacher's pipeline takes the size of its images from its input picture."""
    kind = pipeline_class_of(teacher)
    known = {} if kind is None else inspect.signature(kind.__call__).parameters
    for name in ("height", "width"):
        size = getattr(teacher, name) or dict(teacher.call).get(name)
        if size is None and (name not in known or known[name].default is None):
            return True
    return False


def read_class_labels(asked: Any, known: int) -> list[int]:
    """Classes from `all`, a list, or a text file; the teacher knows classes 0 to `known - 1`."""
    if asked == "all":
        return list(range(known))
    if not isinstance(asked, (str, list)):
        raise UserError(f"class_labels={asked}: give `all`, a list of classes, or a text file")
    named = asked if isinstance(asked, str) else "class_labels"
    labels = _read_names(asked) if isinstance(asked, str) else asked
    if not labels:
        raise UserError(f"{named}: empty: name at least one class")
    return [_class_label(value, known, named) for value in labels]


def _read_names(path: str) -> list[str]:
    try:
        return read_text(path).split()
    except (OSError, ValueError, obstore.exceptions.BaseError) as error:
        raise UserError(
            f"{path}: no readable file of classes ({first_line(error)}): give `all`, a list such as [0,1], or a file"
        ) from error


def _class_label(value: Any, known: int, named: str) -> int:
    if isinstance(value, bool) or not CLASS.fullmatch(str(value)):
        shown = f"{value!r:.60}"
        raise UserError(f"{named}: {shown} is not a class: classes are whole numbers, one per line")
    label = int(value)
    if not 0 <= label < known:
        raise UserError(f"{named}: class {label} is out of range: the teacher knows 0 to {known - 1}")
    return label


def count_classes(teacher: TeacherConfig) -> int:
    """The number of classes of a class-conditional pipeline, from its configuration alone."""
    index = read_config(teacher)
    if labels := index.get("id2label"):
        return len(labels)
    subfolder = next((name for name in DENOISER_NAMES if name in index), DENOISER_NAMES[0])
    denoiser = read_config(teacher, subfolder)
    count = denoiser.get("num_embeds_ada_norm") or denoiser.get("num_class_embeds")
    if not count or "tokenizer" in index:
        raise UserError(
            f"{teacher.pretrained_model_name_or_path}: not class-conditional: give it prompts=FILE "
            "(.txt, .jsonl, .csv or .parquet)"
        )
    return int(count)


def pipeline_class_of(teacher: TeacherConfig) -> type | None:
    """The class of a teacher's pipeline; None for one outside diffusers, and for a modular one with a guider."""
    if teacher.guider:
        return None
    name = teacher.pipeline_class or str(read_config(teacher).get("_class_name"))
    kind = getattr(diffusers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) else None


def read_config(teacher: TeacherConfig, component: str | None = None) -> dict[str, Any]:
    """The configuration of a pipeline, or of one of its components, without weights.

    Raises:
        UserError: it is missing or not readable.
    """
    # Any model or scheduler class will do: only the name of the file matters.
    kind: Any = {None: DiffusionPipeline, "scheduler": DDIMScheduler}.get(component, UNet2DConditionModel)
    path = teacher.pretrained_model_name_or_path
    if component is not None and read_config(teacher).get(component) in (None, [None, None]):
        raise UserError(f"teacher.pretrained_model_name_or_path={path}: has no {component}: it cannot be recorded")
    place = resolve(path)
    if is_single_file(path):
        check_file_of_weights(place, teacher.config or "")
        place = resolve(teacher.config) if teacher.config else ""
    try:
        read = kind.load_config(place, subfolder=component, revision=teacher.revision)
    except (OSError, ValueError) as error:
        if component is not None:
            raise UserError(
                f"teacher.pretrained_model_name_or_path={path}: its {component} has no configuration ({first_line(error)}): "
                "save the pipeline anew with its save_pretrained"
            ) from error
        raise UserError(
            f"teacher.pretrained_model_name_or_path={path}: neither a folder with a diffusers pipeline nor a hub id "
            f"that can be reached ({first_line(error)})"
        ) from error
    return dict(read[0] if isinstance(read, tuple) else read)
