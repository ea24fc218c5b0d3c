"""Make the parts of an evaluation on the GPUs of a Ray cluster. Workers load everything once; the driver retries."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray

from stages.base.loading import first_line, located
from stages.cluster import joined
from stages.errors import UserError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Begin, Evaluation
from stages.evaluate.worker import Worker, number_of_parts

MAX_ATTEMPTS = 3
PATHS = ("prompts", "reference", "features_model", "clip_model", "pretrained_model_name_or_path", "lora")


def evaluate_over_ray(
    evaluation: Evaluation, begin: Begin, num_workers: int | None = None, **resources: float
) -> Iterator[int]:
    """Make the missing parts; yield the number of images of each finished part.

    Args:
        num_workers: by default one per GPU.
        resources: what each worker takes, by Ray's names; by default one GPU.

    Raises:
        UserError: a worker raised it, or a part failed three times.
    """
    with joined():
        fleet = EvaluationFleet(evaluation, resources or {"num_gpus": 1})
        yield from fleet.run(begin, num_workers or fleet.number_of_gpus())


class EvaluationFleet:
    """Actors that Ray never restarts: the fleet replaces a dead one and reassigns its part."""

    def __init__(self, evaluation: Evaluation, resources: dict[str, float]) -> None:
        adapters = {name: located(folder) for name, folder in evaluation.adapters.items()}
        self.arguments = with_absolute_paths(evaluation.config), adapters, evaluation.folder.resolve()
        self.parts = number_of_parts(evaluation.config)
        self.actor = ray.remote(max_restarts=0, max_task_retries=0, **resources)(Worker)
        self.pending: dict[Any, tuple[Any, int | None]] = {}
        self.attempts: Counter[int | None] = Counter()

    def number_of_gpus(self) -> int:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if not gpus:
            raise UserError(
                f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: the cluster has no GPU: unset it to evaluate here"
            )
        return gpus

    def run(self, begin: Begin, num_workers: int) -> Iterator[int]:
        for _ in range(min(num_workers, self.parts)):
            self._add_worker()
        todo: deque[int] | None = None
        idle: list[Any] = []
        try:
            while todo is None or todo or self._in_flight():
                (reference,), _ = ray.wait(list(self.pending), num_returns=1)
                worker, part = self.pending.pop(reference)
                try:
                    made = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._count_failure(part, error)
                    if part is not None and todo is not None:
                        todo.append(part)
                    ray.kill(worker)
                    self._add_worker()
                    continue
                if part is not None:
                    yield made
                elif todo is None:
                    todo = deque(begin(made))
                idle.append(worker)
                while todo and idle:
                    part, worker = todo.popleft(), idle.pop()
                    self.pending[worker.make.remote(part)] = worker, part
        finally:
            for worker in [*idle, *(worker for worker, _ in self.pending.values())]:
                ray.kill(worker)

    def _in_flight(self) -> bool:
        return any(part is not None for _, part in self.pending.values())

    def _add_worker(self) -> None:
        worker = self.actor.remote(*self.arguments)
        self.pending[worker.load.remote()] = worker, None

    def _count_failure(self, part: int | None, error: Exception) -> None:
        """
        Raises:
            UserError: the worker raised it, or this was the last attempt.
        """
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, UserError):
            raise cause
        self.attempts[part] += 1
        if self.attempts[part] >= MAX_ATTEMPTS:
            task = "loading" if part is None else f"part {part}"
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            raise UserError(
                f"{task} failed {MAX_ATTEMPTS} times: {reason}; repeat the command to make the missing parts"
            )


def with_absolute_paths(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with paths that are valid in a worker's working directory."""
    found: dict[str, Any] = {key: located(path) for key in PATHS if (path := getattr(config, key)) is not None}
    return replace(config, **found)
