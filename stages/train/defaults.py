"""Learning rate, length and warm-up of a run: the user's, or chosen by variant and dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from stages.adapters import GuidanceAdapter
from stages.train.compatibility import check_warmup
from stages.train.config import TrainConfig

PASSES = 4  # over the records
LEAST_STEPS, MOST_STEPS = 1_000, 10_000
WARMUP_SHARE = 0.1
MANY_PASSES = 10 * PASSES
VALIDATIONS = 4
MOST_BETWEEN = 1_000  # steps from one validation to the next


@dataclass
class RunConfig(TrainConfig):
    """A configuration in which nothing is left to choose."""

    learning_rate: float = 0.0
    max_train_steps: int = 0
    lr_warmup_steps: int = 0
    validation_steps: int = 0


def complete(config: TrainConfig, records: int, processes: int) -> RunConfig:
    """Choose what the user left open.

    Args:
        records: that the run trains on.

    Raises:
        UsageError: the warm-up is longer than the run.
    """
    given = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    rate = GuidanceAdapter.get_class(config.adapter.variant).default_learning_rate
    steps = config.max_train_steps
    if steps is None:
        passes = round(PASSES * records / (records_per_step(config) * processes))
        steps = min(max(passes, LEAST_STEPS), MOST_STEPS)
    warmup = round(WARMUP_SHARE * steps) if config.lr_warmup_steps is None else config.lr_warmup_steps
    check_warmup(warmup, steps)
    every = min(math.ceil(steps / VALIDATIONS), MOST_BETWEEN)
    chosen = {
        "learning_rate": config.learning_rate or rate,
        "max_train_steps": steps,
        "lr_warmup_steps": warmup,
        "validation_steps": config.validation_steps or every,
    }
    return RunConfig(**given | chosen)


def records_per_step(config: TrainConfig) -> int:
    """Records of one process's optimizer step."""
    return config.train_batch_size * config.gradient_accumulation_steps


def describe_course(config: RunConfig, records: int, processes: int) -> list[str]:
    """The chosen values in a line, and another one where the records are few."""
    size = records_per_step(config) * processes
    passes = config.max_train_steps * size / records
    # diffusers' schedule of this name has none.
    warms_up = config.lr_scheduler != "constant" and config.lr_warmup_steps > 0
    warmup = f" after {config.lr_warmup_steps} steps of warm-up" if warms_up else ""
    course = (
        f"{config.max_train_steps} steps of {size} records, {passes:.1f} passes over {records:,}; learning rate "
        f"{config.learning_rate:g}{warmup}; validation every {config.validation_steps} steps"
    )
    few = f"{records:,} records are few for so many passes: generate more, or lower max_train_steps"
    return [course, few] if passes > MANY_PASSES else [course]
