"""Quality against cost: each method at its best, the Pareto front, and where an alternative beats one pass."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from stages.evaluate.methods import CFG, NONE, ONE_PASS, title_of, uses_adapter
from stages.evaluate.styles import marker_of, style_of

Row = dict[str, Any]


class Quality(NamedTuple):
    """A measure of quality by its column: its name, whether lower is better, and whether it is averaged over scales."""

    column: str
    name: str
    lower: bool = False
    averaged: bool = False


# The first that was measured counts. The gap is one to CFG at the same scale, so there is no best scale for it.
QUALITIES = (
    Quality("frechet_distance", "Frechet distance", lower=True),
    Quality("gap_closed", "gap closed", averaged=True),
)
ADHERENCE = (Quality("class_accuracy", "class accuracy"), Quality("clip_score", "CLIP score"))


class Point(NamedTuple):
    """A method at the scale of its best quality, or on average over the scales; `evaluations` are per image."""

    method: str
    adapter: str | None
    title: str
    scale: float | None
    evaluations: float
    quality: float
    adherence: float | None


@dataclass(frozen=True)
class Pareto:
    """The methods by quality and evaluations per image.

    Attributes:
        points: one per method and adapter, in the order of the rows.
        quality, adherence: what they measure; adherence is None where it was not measured.
        front: the points that no other beats at the same or a lower cost, by ascending cost.
    """

    points: list[Point]
    quality: Quality
    adherence: Quality | None
    front: list[Point]

    @staticmethod
    def of(rows: list[Row]) -> Pareto:
        """The points of an evaluation's rows."""
        quality = next(each for each in QUALITIES if each.column in rows[0])
        adherence = next((each for each in ADHERENCE if each.column in rows[0]), None)
        adapters = list(dict.fromkeys(row["adapter"] for row in rows if row.get("adapter")))
        groups: dict[tuple[str, str | None], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["method"], row.get("adapter")), []).append(row)
        points = [
            point_of(found, quality, adherence, title_of(method, adapter, adapters))
            for (method, adapter), found in groups.items()
        ]
        return Pareto(points, quality, adherence, front_of(points, quality))

    def cells(self) -> list[list[str]]:
        """A table, header first: each method at its best."""
        adherence = [] if self.adherence is None else [self.adherence.name]
        head = ["method", "evaluations", self.quality.name, *([] if self.quality.averaged else ["at scale"])]
        body = [
            [
                point.title,
                f"{point.evaluations:.4g}",
                f"{point.quality:.2f}",
                *([] if point.scale is None else [f"{point.scale:g}"]),
                *([] if point.adherence is None else [f"{point.adherence:.3f}"]),
                "yes" if point in self.front else "",
            ]
            for point in sorted(self.points, key=lambda point: point.evaluations)
        ]
        return [[*head, *adherence, "on the front"], *body]

    def sentences(self) -> list[str]:
        """Which methods are on the front, which beat one pass, and which it beats at a lower or equal cost."""
        found = [f"On the Pareto front of {self.quality.name} and evaluations per image: {self._listed(self.front)}."]
        own = [point for point in self.points if uses_adapter(point.method)]
        if not own:
            return found
        best = min(own, key=lambda point: (self._loss(point), point.evaluations))
        named = f"one pass ({self._figures(best)})" if best.method == ONE_PASS else self._listed([best])
        others = [point for point in self.points if not uses_adapter(point.method) and point.method != NONE]
        better = [point for point in others if self._loss(point) < self._loss(best)]
        free = [point for point in better if point.method != CFG]
        if free:
            found.append(f"Better than {named}, at their own cost: {self._listed(free)}.")
        else:
            found.append(f"No guidance at some steps only is better than {named}, at any cost.")
        found += [f"CFG at all steps is better: {self._figures(p)}." for p in better if p.method == CFG]
        if beaten := [p for p in others if p not in better and p.evaluations >= best.evaluations]:
            found.append(f"At least as costly as one pass and no better: {self._listed(beaten)}.")
        return found

    def _loss(self, point: Point) -> float:
        return point.quality if self.quality.lower else -point.quality

    def _listed(self, points: list[Point]) -> str:
        return "; ".join(f"{point.title} ({self._figures(point)})" for point in points)

    def _figures(self, point: Point) -> str:
        scale = "" if point.scale is None or point.method == NONE else f" at scale {point.scale:g}"
        return f"{point.quality:.2f}{scale} with {point.evaluations:.4g} evaluations"

    def plot(self) -> bytes:
        """A PNG plot of the quality, and of the adherence if measured, against evaluations per image."""
        panels = [(self.quality, [p.quality for p in self.points])]
        if self.adherence is not None:
            panels.append((self.adherence, [p.adherence or 0.0 for p in self.points]))
        figure = Figure(figsize=(3.6 + 3.9 * len(panels), 3.8), layout="constrained")
        for number, (measure, values) in enumerate(panels):
            self._draw(figure.add_subplot(1, len(panels), number + 1), measure, values)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        return content.getvalue()

    def _draw(self, axes: Any, measure: Quality, values: list[float]) -> None:
        adapters = list(dict.fromkeys(point.adapter for point in self.points if point.adapter))
        measured = [point._replace(quality=value) for point, value in zip(self.points, values, strict=True)]
        front = front_of(measured, measure)
        path = [(point.evaluations, point.quality) for point in front]
        path.append((max(point.evaluations for point in self.points), path[-1][1]))
        axes.plot(*zip(*path, strict=True), drawstyle="steps-post", color="#444444", linewidth=1, label="Pareto front")
        for point in measured:
            style = style_of(point.method, point.adapter, adapters) | {"linestyle": "none"}
            axes.plot(point.evaluations, point.quality, marker=marker_of(point.method), markersize=8, **style)
            if point.scale is not None and point.method != NONE:
                place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 7}
                axes.annotate(f"{point.scale:g}", (point.evaluations, point.quality), **place)
        axes.set_xlabel("denoiser evaluations per image")
        better = "lower is better" if measure.lower else "higher is better"
        at = "mean over the scales" if self.quality.averaged else "at the scale beside each point"
        axes.set_title(f"{measure.name} ({better}), {at}", fontsize=9)
        axes.grid(alpha=0.3)


def point_of(rows: list[Row], quality: Quality, adherence: Quality | None, title: str) -> Point:
    """The point of one method's rows, which differ in the scale."""
    chosen = rows if quality.averaged else [sorted(rows, key=lambda r: r[quality.column], reverse=not quality.lower)[0]]

    def mean(column: str) -> float:
        return statistics.fmean(row[column] for row in chosen)

    return Point(
        rows[0]["method"],
        rows[0].get("adapter"),
        title,
        None if quality.averaged else chosen[0]["guidance_scale"],
        mean("denoiser_evaluations"),
        mean(quality.column),
        None if adherence is None else mean(adherence.column),
    )


def front_of(points: list[Point], quality: Quality) -> list[Point]:
    """The points that are better than all others of the same or a lower cost, by ascending cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.evaluations, p.quality if quality.lower else -p.quality)):
        if not front or (point.quality < front[-1].quality if quality.lower else point.quality > front[-1].quality):
            front.append(point)
    return front
