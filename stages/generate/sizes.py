"""The sizes of a dataset's trajectories: of their conditions, or the configured ones in turn."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np

from stages.base.sampling import Condition
from stages.base.size import Size
from stages.errors import UsageError, UserError
from stages.generate.conditions import pipeline_class_of
from stages.generate.config import TeacherConfig


class Sizes:
    """Gives each trajectory its size: that of its condition, or else the configured sizes in turn.

    A condition takes the configured sizes in turn from repetition to repetition, beginning with another than the
    condition before it. So the sizes of earlier trajectories stay when a dataset grows.

    Raises:
        UserError: a size is none, or the teacher's pipeline takes no size.
    """

    def __init__(self, teacher: TeacherConfig, conditions: Sequence[Condition]) -> None:
        configured: list[Size | None] = [*read_sizes(teacher)]
        self.in_turn = configured or [None]
        own = [Size.from_columns(condition) for condition in conditions]
        self.known = list(dict.fromkeys([*self.in_turn, *filter(None, own)]))
        number = {size: i for i, size in enumerate(self.known)}
        self.own = np.array([-1 if size is None else number[size] for size in own])
        check_pipeline(teacher, self.known)

    def numbers(self, turns: np.ndarray) -> np.ndarray:
        """The number of each trajectory's size `[n]`, from its (repetition, condition) `[n, 2]`."""
        own = self.own[turns[:, 1]]
        return np.where(own < 0, turns.sum(axis=1) % len(self.in_turn), own)

    def columns(self, turn: np.ndarray) -> dict[str, int]:
        """A trajectory's size as columns of its condition, from its (repetition, condition) `[2]`."""
        size = self.known[int(self.numbers(turn[None])[0])]
        return {} if size is None else size.columns


def read_sizes(teacher: TeacherConfig) -> list[Size]:
    """The sizes of `teacher.sizes`.

    Raises:
        UsageError: one of them is no size, or stands there twice, or `teacher.height` or `teacher.width` is given, too.
    """
    sizes: list[Size] = []
    for values in teacher.sizes:
        try:
            size = Size.from_list(values)
        except ValueError as error:
            raise UsageError(f"teacher.sizes: {values}: {error}: such as teacher.sizes=[[64,64]]") from error
        if size in sizes:
            raise UsageError(f"teacher.sizes: {size.name} stands there twice: name each size once")
        sizes.append(size)
    for key in ("height", "width"):
        if sizes and (value := getattr(teacher, key)) is not None:
            raise UsageError(f"teacher.{key}={value}: teacher.sizes decides it: leave one of them out")
    return sizes


def check_pipeline(teacher: TeacherConfig, sizes: Sequence[Size | None]) -> None:
    """
    Raises:
        UserError: the teacher's pipeline does not take what a size names.
    """
    kind = pipeline_class_of(teacher)
    known = None if kind is None else inspect.signature(kind.__call__).parameters
    for size in filter(None, sizes):
        for key in size.columns:
            if kind is not None and known is not None and key not in known:
                raise UserError(f"size {size.name}: {kind.__name__} takes no {key}: leave the size out")
            if key in teacher.call:
                raise UsageError(f"teacher.call.{key}: decided by the sizes of the trajectories: leave it out")
