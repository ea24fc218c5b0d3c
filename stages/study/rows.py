"""The rows of a study, filtered and averaged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from stages.evaluate.methods import CFG, NONE, ONE_PASS

Row = dict[str, Any]
ACCURACIES = (
    "class_accuracy",
    "category_accuracy",
    "retrieval_top1",
    "retrieval_top5",
)


class MissingRowsError(Exception):
    """The evaluation lacks the rows, or the measurements, that a judgement needs; the text says which."""


class Rows:
    """Rows of a study, to filter and average.

    Args:
        chosen: what they have in common, in words.
    """

    def __init__(self, rows: Iterable[Row], chosen: tuple[str, ...] = ()) -> None:
        self.rows, self.chosen = list(rows), chosen

    def where(self, **values: Any) -> Rows:
        found = [row for row in self.rows if all(row.get(key) == value for key, value in values.items())]
        return Rows(found, (*self.chosen, *(f"{key} {value}" for key, value in values.items())))

    def named(self, names: list[str]) -> Rows:
        """The one-pass rows of these adapters."""
        own = self.where(method=ONE_PASS)
        return Rows((row for row in own.rows if row["name"] in names), (*own.chosen, f"adapter {' or '.join(names)}"))

    def unique(self, key: str) -> list[Any]:
        """The distinct values of a column, sorted."""
        return sorted({row[key] for row in self.rows if row.get(key) is not None})

    def mean(self, key: str) -> float:
        """
        Raises:
            MissingRowsError: there are no rows, or one of them lacks the column or holds no finite number there.
        """
        values: list[Any] = [row.get(key) for row in self.rows]
        if not values or None in values or not all(map(math.isfinite, values)):
            raise MissingRowsError(f"no {'finite ' if values and None not in values else ''}{key} of {self}")
        return statistics.fmean(values)

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(self.chosen)) or "any row"

    def by_seed(self, key: str) -> list[float]:
        """The means over scales, one for each seed; of rows without a seed there is one."""
        return [self.where(seed=seed).mean(key) for seed in self.unique("seed")] or [self.mean(key)]

    def format(self, key: str, form: str = ".3f") -> str:
        """The mean over the seeds of their means over scales; with several seeds, ± the largest deviation from it."""
        values = self.by_seed(key)
        mean = statistics.fmean(values)
        spread = max(abs(value - mean) for value in values)
        return f"{mean:{form}} ± {spread:{form}}" if len(values) > 1 else f"{mean:{form}}"

    def by_scale(self, key: str, form: str = ".3f") -> str:
        scales = self.unique("guidance_scale")
        return ", ".join(f"{self.where(guidance_scale=scale).format(key, form)} at {scale:g}" for scale in scales)

    def least_over_scales(self, key: str) -> float:
        scales = self.unique("guidance_scale")
        if not scales:
            raise MissingRowsError(f"no {key} of {self}")
        return min(self.where(guidance_scale=scale).mean(key) for scale in scales)

    def quality(self, name: str) -> str:
        own = self.named([name])
        return (
            f"{name}: gap closed {own.format('gap_closed')}, Frechet distance {own.format('frechet_distance', '.1f')}"
        )


def best_adapter(rows: Rows, adapters: list[str]) -> str:
    """The adapter whose least share of the gap closed, over the scales, is the greatest."""
    return max(adapters, key=lambda name: rows.named([name]).least_over_scales("gap_closed"))


def cfgs_best_scale(rows: Rows) -> float:
    """The scale at which CFG's Frechet distance is least."""
    cfg = rows.where(method=CFG)
    scales = cfg.unique("guidance_scale")
    if not scales:
        raise MissingRowsError(f"no frechet_distance of {cfg}")
    return min(scales, key=lambda scale: cfg.where(guidance_scale=scale).mean("frechet_distance"))


def below_cfgs_best_scale(rows: Rows, name: str) -> str:
    """That the adapter's effective scale reaches CFG's best scale at no scale that it is asked for; else empty."""
    own, best = rows.named([name]), cfgs_best_scale(rows)
    highest = max(own.where(guidance_scale=scale).mean("effective_scale") for scale in own.unique("guidance_scale"))
    return "" if highest >= best else f"; effective scale at most {highest:.2f}, CFG's best {best:g}"


def cfg_at(rows: Rows, key: str, scale: float) -> float:
    """A figure of CFG at any scale, linear between the measured ones; at 1 it is that of no guidance."""
    cfg = rows.where(method=CFG)
    points = {1.0: rows.where(method=NONE).mean(key)}
    points |= {each: cfg.where(guidance_scale=each).mean(key) for each in cfg.unique("guidance_scale")}
    scale = min(max(scale, 1.0), max(points))
    below = max(each for each in points if each <= scale)
    above = min(each for each in points if each >= scale)
    weight = (scale - below) / (above - below) if above > below else 0.0
    return points[below] + weight * (points[above] - points[below])


def measured_accuracies(rows: Rows) -> list[str]:
    """The measures of prompt adherence that the rows have."""
    keys = [key for key in ACCURACIES if rows.unique(key)]
    if not keys:
        raise MissingRowsError(f"no {', '.join(ACCURACIES)} of {rows}")
    return keys


def words(key: str) -> str:
    """A column's name without underscores, and without `accuracy`."""
    return key.removesuffix("_accuracy").replace("_", " ")
