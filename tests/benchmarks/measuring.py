"""Shared parts of the benchmarks: a clock that waits for the GPU, and interleaved measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

LEAST_ROUNDS = 3


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes, including its work on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(kinds: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Measure each kind once per round until the seconds are over, for at least a few rounds."""
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    start = time.perf_counter()
    while len(next(iter(taken.values()))) < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name, measure in kinds.items():
            taken[name].append(measure())
    return taken


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum, to four digits."""
    values_by_name = {"median": statistics.median(values), "from": min(values), "to": max(values)}
    return {name: float(f"{value:.4g}") for name, value in values_by_name.items()}


def ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """Return the spread of one kind's ratio to another, round by round."""
    return spread([value / other for value, other in zip(values, base, strict=True)])
