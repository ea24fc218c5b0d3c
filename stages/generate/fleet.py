"""Teachers as Ray actors, on this machine or over a cluster."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

# Read by ray when it is imported: its workers keep the devices that they see, and nothing is sent home.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from stages.base import resolve
from stages.errors import UserError
from stages.generate.config import GenerateConfig
from stages.generate.driver import Failed, Loaded, Made
from stages.generate.unit import UnitWorker


class RayFleet:
    """Plain actors that Ray never restarts: the driver owns retries, and this fleet replaces who died.

    An actor for which the cluster has no room yet waits inside Ray and starts when a node joins.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            start_ray(config)
        path = resolve(config.teacher.pretrained_model_name_or_path)
        teacher = replace(
            config.teacher, pretrained_model_name_or_path=str(Path(path).resolve()) if Path(path).is_dir() else path
        )
        self.config = replace(config, teacher=teacher, output_dir=str(Path(config.output_dir).resolve()))
        self.actor = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_restarts=0, max_task_retries=0)(
            UnitWorker
        )
        self.waiting: dict[Any, tuple[Any, int | None]] = {}
        self.ready: list[Any] = []
        for _ in range(config.num_workers):
            self._add_worker()

    def _add_worker(self) -> None:
        try:
            worker = self.actor.remote(self.config)
        except ValueError as error:
            asked = f"num_cpus={self.config.num_cpus:g} num_gpus={self.config.num_gpus:g}"
            raise UserError(f"{asked}: Ray cannot keep that for a worker: {' '.join(map(str, error.args))}") from error
        self.waiting[worker.load.remote()] = (worker, None)

    def idle(self) -> int:
        return len(self.ready)

    def dispatch(self, unit: int) -> None:
        worker = self.ready.pop()
        self.waiting[worker.make.remote(unit)] = (worker, unit)

    def poll(self, timeout: float) -> list[Loaded | Made | Failed]:
        finished, _ = ray.wait(list(self.waiting), num_returns=1, timeout=timeout)
        return [self._event(reference) for reference in finished]

    def _event(self, reference: Any) -> Loaded | Made | Failed:
        worker, unit = self.waiting.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            if unit is None:
                ray.kill(worker)
                self._add_worker()
            else:
                self.ready.append(worker)
            return Failed(unit, error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:
            self._add_worker()
            return Failed(unit, error, preempted=isinstance(error, RayActorError) and bool(error.preempted))
        self.ready.append(worker)
        return Loaded(result) if unit is None else Made(unit, result)

    def close(self) -> None:
        for worker in [*self.ready, *(worker for worker, _ in self.waiting.values())]:
            ray.kill(worker)
        if self.started_ray:
            ray.shutdown()


def start_ray(config: GenerateConfig) -> None:
    """Join the cluster that the configuration or RAY_ADDRESS names, else start Ray on this machine."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            cores = max(os.cpu_count() or 1, math.ceil(config.num_workers * config.num_cpus))
            ray.init(
                address="local",
                num_cpus=cores,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False,
            )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise UserError(f"ray_address={address}: no Ray cluster could be joined there: {error}") from error
