"""What the benchmarks share: a clock that waits for the GPU, and measurements that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

LEAST_ROUNDS = 3


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def timed(work: Callable[[], object]) -> float:
    """Seconds, with all that the GPU was given meanwhile."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(kinds: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """What each kind measures, round by round, until so many seconds are over; at least a few rounds."""
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    start = time.perf_counter()
    while len(next(iter(taken.values()))) < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name, measure in kinds.items():
            taken[name].append(measure())
    return taken


def spread(values: list[float]) -> dict[str, float]:
    """The median and the ends, to four digits."""
    info = {"median": statistics.median(values), "from": min(values), "to": max(values)}
    return {name: float(f"{value:.4g}") for name, value in info.items()}


def ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """The spread of one kind over another, each round for itself."""
    return spread([value / other for value, other in zip(values, base, strict=True)])
