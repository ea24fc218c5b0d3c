"""The parts of an evaluation over the GPUs that Ray has: each loads everything once; the driver here owns retries."""

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
PATHS = ("prompts", "reference", "inception_weights", "clip_model", "pretrained_model_name_or_path", "lora")


def evaluate_over_ray(
    evaluation: Evaluation, begin: Begin, num_workers: int | None = None, **resources: float
) -> Iterator[int]:
    """Make the parts that are missing; the number of images of each as it is made.

    Args:
        num_workers: by default one per GPU; resources: what each takes, as Ray names it, by default one GPU.

    Raises:
        UserError: a worker refused, or a part failed three times.
    """
    with joined():
        fleet = EvaluationFleet(evaluation, resources or {"num_gpus": 1})
        yield from fleet.run(begin, num_workers or fleet.number_of_gpus())


class EvaluationFleet:
    """Plain actors that Ray never restarts; one that dies is replaced, and its part goes to another."""

    def __init__(self, evaluation: Evaluation, resources: dict[str, float]) -> None:
        adapters = {name: located(folder) for name, folder in evaluation.adapters.items()}
        self.given = everywhere(evaluation.config), adapters, evaluation.folder.resolve()
        self.parts = number_of_parts(evaluation.config)
        self.actor = ray.remote(max_restarts=0, max_task_retries=0, **resources)(Worker)
        self.waiting: dict[Any, tuple[Any, int | None]] = {}
        self.attempts: Counter[int | None] = Counter()

    def number_of_gpus(self) -> int:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if not gpus:
            raise UserError(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no GPU there: unset it to evaluate here")
        return gpus

    def run(self, begin: Begin, num_workers: int) -> Iterator[int]:
        for _ in range(min(num_workers, self.parts)):
            self._add_worker()
        todo: deque[int] | None = None
        idle: list[Any] = []
        try:
            while todo is None or todo or self._in_flight():
                (reference,), _ = ray.wait(list(self.waiting), num_returns=1)
                worker, part = self.waiting.pop(reference)
                try:
                    made = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._see_failure(part, error)
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
                    self.waiting[worker.make.remote(part)] = worker, part
        finally:
            for worker in [*idle, *(worker for worker, _ in self.waiting.values())]:
                ray.kill(worker)

    def _in_flight(self) -> bool:
        return any(part is not None for _, part in self.waiting.values())

    def _add_worker(self) -> None:
        worker = self.actor.remote(*self.given)
        self.waiting[worker.load.remote()] = worker, None

    def _see_failure(self, part: int | None, error: Exception) -> None:
        """
        Raises:
            UserError: another attempt would not do better.
        """
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, UserError):
            raise cause
        self.attempts[part] += 1
        if self.attempts[part] >= MAX_ATTEMPTS:
            what = "loading" if part is None else f"part {part}"
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            raise UserError(
                f"{what} failed {MAX_ATTEMPTS} times: {reason}; the same command goes on with what is missing"
            )


def everywhere(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with paths that a worker in another folder finds too."""
    found: dict[str, Any] = {key: located(path) for key in PATHS if (path := getattr(config, key)) is not None}
    return replace(config, **found)
