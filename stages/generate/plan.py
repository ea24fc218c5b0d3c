"""The plan: which trajectories a dataset holds, and which unit makes each. A pure function of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin

from stages.base import DENOISER_NAMES, first_line, resolve_model
from stages.config import check_bounds
from stages.errors import UserError
from stages.generate.config import GenerateConfig

GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class PlannedTrajectory:
    """What is decided of a trajectory before the teacher runs."""

    index: int
    seed: int
    guidance_scale: float
    class_label: int


@dataclass(frozen=True)
class Unit:
    """The work that makes one shard: its trajectories, and where in the spacing of its timestep grid the grid lies."""

    index: int
    trajectories: list[PlannedTrajectory]
    shift: float


class Plan:
    """Every unit of a dataset, made when asked for; `len(plan)` units.

    A trajectory's seed and scale follow from (dataset seed, its index) alone, so neither the number of workers, nor the
    batch size, nor a restart changes what the dataset holds.

    Raises:
        UserError: the configuration asks for something impossible.
    """

    def __init__(self, config: GenerateConfig) -> None:
        check(config)
        self.config = config
        self.class_labels = read_class_labels(config)

    def __len__(self) -> int:
        return -(-self.config.num_trajectories // self.config.trajectories_per_unit)

    def unit(self, index: int) -> Unit:
        size, total = self.config.trajectories_per_unit, self.config.num_trajectories
        indices = range(index * size, min((index + 1) * size, total))
        # A golden-ratio sequence spreads any number of shifts evenly over the spacing; a random one leaves holes.
        shift = ((index + 0.5) * GOLDEN_RATIO) % 1.0 if self.config.shift_timesteps else 0.0
        return Unit(index, [self.trajectory(i) for i in indices], shift)

    def trajectory(self, index: int) -> PlannedTrajectory:
        sequence = np.random.SeedSequence([self.config.seed, index])
        low, high = self.config.guidance_scale
        scale = low + (high - low) * np.random.default_rng(sequence).random()
        seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return PlannedTrajectory(index, seed, float(scale), self.class_labels[index % len(self.class_labels)])


def check(config: GenerateConfig) -> None:
    """Refuse what no run could carry out, before anything is loaded."""
    check_bounds(config)
    scale = config.guidance_scale
    if len(scale) != 2:
        raise UserError(f"guidance_scale={list(scale)}: give the lowest and the highest scale, e.g. [1, 6]")
    if scale[0] < 1:
        raise UserError(f"guidance_scale={list(scale)}: scales below 1 are not guidance: begin the range at 1 or above")
    if not scale[0] <= scale[1] < float("inf"):
        raise UserError(f"guidance_scale={list(scale)}: the range is upside down or endless: lowest scale first")
    steps = config.num_inference_steps
    if steps > (most := count_timesteps(config.teacher.pretrained_model_name_or_path)):
        raise UserError(f"num_inference_steps={steps}: at most {most}, the timesteps of the teacher's scheduler")


def read_class_labels(config: GenerateConfig) -> list[int]:
    """The classes asked for, each of which the teacher knows."""
    known = count_classes(config.teacher.pretrained_model_name_or_path)
    asked = config.class_labels
    if asked == "all":
        return list(range(known))
    if not isinstance(asked, (str, list)):
        raise UserError(f"class_labels={asked}: give `all`, a list of classes, or a text file")
    named = asked if isinstance(asked, str) else "class_labels"
    labels = _read_lines(Path(asked)) if isinstance(asked, str) else asked
    if not labels:
        raise UserError(f"{named}: empty: name at least one class")
    return [_class_label(value, known, named) for value in labels]


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: no readable file of classes ({first_line(error)}): give `all`, a list, or a file"
        ) from error


def _class_label(value: Any, known: int, named: str) -> int:
    if isinstance(value, bool) or not str(value).lstrip("-").isdecimal():
        raise UserError(f"{named}: {value!r} is not a class: classes are whole numbers, one per line")
    label = int(value)
    if not 0 <= label < known:
        raise UserError(f"{named}: class {label} is out of range: the teacher knows 0 to {known - 1}")
    return label


def count_classes(name_or_path: str) -> int:
    """How many classes a class-conditional pipeline knows, from its configuration alone."""
    index = read_config(name_or_path)
    if labels := index.get("id2label"):
        return len(labels)
    subfolder = next((name for name in DENOISER_NAMES if name in index), DENOISER_NAMES[0])
    denoiser = read_config(name_or_path, subfolder)
    count = denoiser.get("num_embeds_ada_norm") or denoiser.get("num_class_embeds")
    if not count:
        raise UserError(
            f"{name_or_path}: not class-conditional: only teachers that take `class_labels` can be recorded yet"
        )
    return int(count)


def count_timesteps(name_or_path: str) -> int:
    """How many timesteps a pipeline's scheduler was trained with."""
    return int(read_config(name_or_path, "scheduler").get("num_train_timesteps", 1000))


def read_config(name_or_path: str, component: str | None = None) -> dict[str, Any]:
    """The configuration of a pipeline, or of one of its components; no weights are loaded.

    Raises:
        UserError: there is none to be read.
    """
    kind: Any = {None: DiffusionPipeline, "scheduler": DDIMScheduler}.get(component, ModelMixin)  # each knows its file
    try:
        read = kind.load_config(resolve_model(name_or_path), subfolder=component)
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher.pretrained_model_name_or_path={name_or_path}: neither a folder with a diffusers pipeline nor a hub id "
            f"that can be reached ({first_line(error)})"
        ) from error
    return dict(read[0] if isinstance(read, tuple) else read)
