"""The plan of a dataset: its trajectories and units, a pure function of the configuration and of earlier plans."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stages.base.sampling import Condition
from stages.configuration.options import check_bounds
from stages.errors import UsageError
from stages.generate.call_arguments import check_arguments
from stages.generate.conditions import pipeline_class_of, read_conditions
from stages.generate.config import GenerateConfig
from stages.generate.sizes import Sizes
from stages.generate.steps import count_steps
from stages.generate.unit import PlannedTrajectory, Unit
from stages.records.schema import PlanEntry

GOLDEN_RATIO = 0.6180339887498949


class Plan:
    """The units of a dataset; `len(plan)` is their number, and `unit` makes one.

    A trajectory's seed and scale follow from (dataset seed, its index) alone. So the number of workers, the batch size
    and restarts do not change the records. The units of earlier plans stay as they are; new trajectories get units of
    their own.

    Args:
        earlier: the published plans of `dataset.json`, oldest first; their conditions come first in this plan's.

    Attributes:
        turns: (repetition, condition) of each trajectory `[num_trajectories, 2]`.
        order: the trajectories, unit by unit `[num_trajectories]`.
        bounds: where in `order` each unit begins, and the end of the last `[len(plan) + 1]`.
        sizes: the size of each trajectory.
        steps_per_trajectory: the scheduler's; they may be more or fewer than `num_inference_steps`.

    Raises:
        UsageError: the configuration asks for something impossible.
    """

    def __init__(self, config: GenerateConfig, earlier: Sequence[PlanEntry] = ()) -> None:
        check(config)
        self.steps_per_trajectory = count_steps(config.teacher, config.num_inference_steps)
        check_recorded_steps(config, self.steps_per_trajectory)
        self.config = config
        self.conditions = read_conditions(config)
        self.sizes = Sizes(config.teacher, self.conditions)
        self.turns = np.empty((0, 2), dtype=np.int64)
        self.order = np.empty(0, dtype=np.int64)
        self.bounds = np.zeros(1, dtype=np.int64)
        for plan in earlier:
            self._add(plan.trajectories, plan.conditions.count)
        asked = config.num_trajectories or len(self.conditions) * config.num_trajectories_per_condition
        self._add(asked - len(self.turns), None)

    def _add(self, count: int, num_conditions: int | None) -> None:
        """Plan `count` more trajectories of the first `num_conditions` conditions; None for all."""
        made = np.bincount(self.turns[:, 1], minlength=len(self.conditions))[:num_conditions]
        turns, begin = take_turns(made, count), len(self.turns)
        self.turns = np.concatenate([self.turns, turns])
        numbers = self.sizes.numbers(turns)
        self.order = np.concatenate([self.order, begin + np.argsort(numbers, kind="stable")])
        _, counts = np.unique(numbers, return_counts=True)
        for end in begin + counts.cumsum():
            self.bounds = np.append(self.bounds, np.arange(begin, end, self.config.trajectories_per_unit)[1:])
            self.bounds = np.append(self.bounds, end)
            begin = end

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_trajectories(self) -> int:
        return len(self.turns)

    @property
    def records_per_trajectory(self) -> int:
        return self.config.num_recorded_steps or self.steps_per_trajectory

    @property
    def num_records(self) -> int:
        return self.num_trajectories * self.records_per_trajectory

    def trajectories_of(self, unit: int) -> list[int]:
        """The trajectories of a unit, which all have one size."""
        begin, end = self.bounds[unit : unit + 2].tolist()
        return self.order[begin:end].tolist()

    def records_of(self, unit: int) -> int:
        """The number of records in a unit."""
        return len(self.trajectories_of(unit)) * self.records_per_trajectory

    @property
    def evaluations_per_trajectory(self) -> int:
        """Evaluations of a denoiser that is guided by two passes a step, as most are."""
        return 2 * self.steps_per_trajectory * runs_per_trajectory(self.config)

    @property
    def scale_range(self) -> list[float]:
        """The lowest and the highest possible scale of a trajectory."""
        given = [c["guidance_scale"] for c in self.conditions if "guidance_scale" in c]
        drawn = self.config.guidance_scale if len(given) < len(self.conditions) else []
        return [min([*given, *drawn]), max([*given, *drawn])]

    @property
    def examples(self) -> list[Condition]:
        """The condition of the first trajectory of each size."""
        _, first = np.unique(self.sizes.numbers(self.turns), return_index=True)
        return [self.trajectory(index).condition for index in sorted(first.tolist())]

    def unit(self, index: int) -> Unit:
        # A golden-ratio sequence spreads any number of shifts evenly over the spacing; a random one leaves holes.
        shift = ((index + 0.5) * GOLDEN_RATIO) % 1.0 if self.config.shift_timesteps else 0.0
        return Unit(index, [self.trajectory(i) for i in self.trajectories_of(index)], shift)

    def trajectory(self, index: int) -> PlannedTrajectory:
        sequence = np.random.SeedSequence([self.config.seed, index])
        random = np.random.default_rng(sequence)
        repetition, place = self.turns[index].tolist()
        condition = self.conditions[place] | self.sizes.columns(self.turns[index])
        scale = draw_scale(self.config, random)
        scale = condition.pop("guidance_scale", scale)
        seed = condition.pop("seed", None)
        if seed is None or repetition:
            origin = sequence if seed is None else np.random.SeedSequence([seed, repetition])
            seed = int(origin.generate_state(1, np.uint64)[0] >> np.uint64(1))
        steps = None
        if self.config.num_recorded_steps is not None:
            chosen = random.choice(self.steps_per_trajectory, self.config.num_recorded_steps, replace=False)
            steps = sorted(chosen.tolist())
        return PlannedTrajectory(index, seed, scale, condition, steps)


def runs_per_trajectory(config: GenerateConfig) -> int:
    """How often the pipeline runs for a trajectory: for a diffusion trajectory twice."""
    return 2 if config.trajectory == "diffusion" else 1


def take_turns(made: np.ndarray, count: int) -> np.ndarray:
    """The next (repetition, condition) pairs `[count, 2]`.

    Conditions take turns in their order, those with fewer trajectories first.

    Args:
        made: the number of trajectories that each condition has `[n]`.
    """
    rounds = [np.empty((0, 2), dtype=np.int64)]
    repetition = int(made.min())
    while count > 0 and repetition < made.max():
        places = np.flatnonzero(made <= repetition)[:count]
        rounds.append(np.stack([np.full_like(places, repetition), places], axis=1))
        count -= len(places)
        repetition += 1
    rounds.append(np.stack(np.divmod(np.arange(count) + repetition * len(made), len(made)), axis=1))
    return np.concatenate(rounds)


def draw_scale(config: GenerateConfig, random: np.random.Generator) -> float:
    """Draw a guidance scale from the configured distribution."""
    scales = config.guidance_scale
    if config.guidance_scale_distribution == "list":
        return float(scales[int(random.integers(len(scales)))])
    low, high = scales
    if config.guidance_scale_distribution == "log_uniform":
        return math.exp(math.log(low) + (math.log(high) - math.log(low)) * random.random())
    return float(low + (high - low) * random.random())


def check(config: GenerateConfig) -> None:
    """Refuse an impossible configuration before anything is loaded."""
    check_bounds(config)
    scale = config.guidance_scale
    option = f"guidance_scale={list(scale)}"
    if config.guidance_scale_distribution == "list":
        if not scale:
            raise UsageError(f"{option}: empty: name the scales to draw from")
    elif len(scale) != 2:
        raise UsageError(f"{option}: give the lowest and the highest scale, e.g. [1, 6]")
    elif scale[0] > scale[1]:
        raise UsageError(f"{option}: the range is upside down: lowest scale first")
    if not all(value >= 1 for value in scale):
        raise UsageError(f"{option}: scales below 1 are not guidance: begin at 1 or above")
    if not all(value < float("inf") for value in scale):
        raise UsageError(f"{option}: endless: give finite scales")
    if config.num_trajectories is not None and config.num_trajectories_per_condition != 1:
        raise UsageError(
            f"num_trajectories={config.num_trajectories}: tells the same as num_trajectories_per_condition: give one of them"
        )
    check_arguments(pipeline_class_of(config.teacher), config.teacher.call, config.teacher)


def check_recorded_steps(config: GenerateConfig, steps: int) -> None:
    """Refuse to record more steps of a trajectory than it has."""
    if config.num_recorded_steps is not None and config.num_recorded_steps > steps:
        asked = f"num_inference_steps={config.num_inference_steps}"
        most = asked if steps == config.num_inference_steps else f"{steps}, which the teacher takes of {asked}"
        raise UsageError(f"num_recorded_steps={config.num_recorded_steps}: at most {most}")
