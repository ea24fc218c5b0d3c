"""Quality against cost: each method at its best, the Pareto front, and which alternatives have better figures."""

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
    format: str = ".3f"
    lower: bool = False
    averaged: bool = False


QUALITIES = (
    Quality("frechet_distance", "Frechet distance", ".2f", lower=True),
    Quality("gap_closed", "gap closed", averaged=True),  # it is to CFG at the same scale, so it has no best scale
)
# The first that was measured counts.
ADHERENCE = (
    Quality("retrieval_top1", "retrieval, top 1"),
    Quality("class_accuracy", "class accuracy"),
    Quality("clip_score", "CLIP score", ".2f"),
)


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
    """The methods by one quality and evaluations per image.

    Attributes:
        points: one per method and adapter, in the order of the rows.
        quality, adherence: what they measure; adherence is None where it was not measured or is averaged away.
        front: the points that no other beats at the same or a lower cost, by ascending cost.
    """

    points: list[Point]
    quality: Quality
    adherence: Quality | None
    front: list[Point]

    @staticmethod
    def of(rows: list[Row], quality: Quality) -> Pareto:
        """The points of an evaluation's rows; of the gap, without rows at which there was none to close."""
        rows = [row for row in rows if row[quality.column] is not None]
        measured = [] if quality.averaged else [each for each in ADHERENCE if each.column in rows[0]]
        adherence = measured[0] if measured else None
        adapters = list(dict.fromkeys(row["adapter"] for row in rows if row.get("adapter")))
        groups: dict[tuple[str, str | None], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["method"], row.get("adapter")), []).append(row)
        points = [
            point_of(found, quality, adherence, title_of(method, adapter, adapters))
            for (method, adapter), found in groups.items()
        ]
        return Pareto(points, quality, adherence, front_of(points, quality))

    def sentences(self) -> list[str]:
        """Which methods are on the front, and which have better figures than one pass, or none at a like or higher cost."""
        found = [f"On the Pareto front of {self.quality.name} and evaluations per image: {self._listed(self.front)}."]
        own = [point for point in self.points if uses_adapter(point.method)]
        if not own:
            return found
        best = min(own, key=lambda point: (self._loss(point), point.evaluations))
        named = f"one pass ({self._figures(best)})" if best.method == ONE_PASS else self._listed([best])
        others = [point for point in self.points if not uses_adapter(point.method) and point.method != NONE]
        better = [point for point in others if self._loss(point) < self._loss(best)]
        free = [point for point in better if point.method != CFG]
        figure = f"a {'lower' if self.quality.lower else 'higher'} {self.quality.name}"
        if free:
            found.append(f"With {figure} than {named}, at their own cost: {self._listed(free)}.")
        elif any(point.method != CFG for point in others):
            found.append(f"None of the methods that guide at some steps only has {figure} than {named}, at any cost.")
        if not self.quality.averaged:  # else CFG is the measure
            found += [f"CFG at all steps has {figure}: {self._figures(p)}." for p in better if p.method == CFG]
        if beaten := [p for p in others if p not in better and p.evaluations >= best.evaluations]:
            found.append(f"At least as costly as {named}, without {figure}: {self._listed(beaten)}.")
        return found

    def _loss(self, point: Point) -> float:
        return point.quality if self.quality.lower else -point.quality

    def _listed(self, points: list[Point]) -> str:
        return "; ".join(f"{point.title} ({self._figures(point)})" for point in points)

    def _figures(self, point: Point) -> str:
        scale = "" if point.scale is None or point.method == NONE else f" at scale {point.scale:g}"
        return f"{point.quality:{self.quality.format}}{scale} with {point.evaluations:.4g} evaluations"

    def panels(self) -> list[tuple[Quality, list[Point]]]:
        """What to plot: the quality, and the adherence in its place if it was measured."""
        if self.adherence is None:
            return [(self.quality, self.points)]
        adhering = [point._replace(quality=point.adherence or 0.0) for point in self.points]
        return [(self.quality, self.points), (self.adherence, adhering)]


def paretos_of(rows: list[Row]) -> list[Pareto]:
    """One for each quality that was measured."""
    return [Pareto.of(rows, quality) for quality in QUALITIES if quality.column in rows[0]]


def sentences(rows: list[Row], num_samples: int) -> list[str]:
    """What the fronts say, in words."""
    found = [sentence for pareto in paretos_of(rows) for sentence in pareto.sentences()]
    chance = "how much they vary with it is not measured, so a small difference may be chance"
    return [*found, f"These are figures of {num_samples:,} images a row from one set of noise: {chance}."]


def cells(rows: list[Row]) -> list[list[str]]:
    """A table, header first: each method at its best, by ascending cost, and on which fronts it is."""
    paretos = paretos_of(rows)
    head = ["method", "evaluations"]
    for pareto in paretos:
        head.append(pareto.quality.name)
        head += [] if pareto.quality.averaged else ["at scale"]
        head += [] if pareto.adherence is None else [pareto.adherence.name]
    body = []
    by_method = [{(point.method, point.adapter): point for point in pareto.points} for pareto in paretos]
    for key, first in sorted(by_method[0].items(), key=lambda item: item[1].evaluations):
        line, fronts = [first.title, f"{first.evaluations:.4g}"], []
        for pareto, points in zip(paretos, by_method, strict=True):
            if (point := points.get(key)) is None:  # without a gap to close
                line.append("none")
                continue
            line.append(f"{point.quality:{pareto.quality.format}}")
            line += [] if point.scale is None else [f"{point.scale:g}"]
            line += [] if pareto.adherence is None else [f"{point.adherence:{pareto.adherence.format}}"]
            fronts += [pareto.quality.name] if point in pareto.front else []
        body.append([*line, ", ".join(fronts)])
    return [[*head, "on the front of"], *body]


def plot(rows: list[Row]) -> bytes:
    """A PNG plot: each quality, and the adherence if measured, against evaluations per image."""
    panels = [panel for pareto in paretos_of(rows) for panel in pareto.panels()]
    figure = Figure(figsize=(2.2 + 3.7 * len(panels), 3.8), layout="constrained")
    for number, (measure, points) in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), number + 1), measure, points)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def draw(axes: Any, measure: Quality, points: list[Point]) -> None:
    """Draw the points, each with its scale, and their front."""
    adapters = list(dict.fromkeys(point.adapter for point in points if point.adapter))
    path = [(point.evaluations, point.quality) for point in front_of(points, measure)]
    path.append((max(point.evaluations for point in points), path[-1][1]))
    axes.plot(*zip(*path, strict=True), drawstyle="steps-post", color="#444444", linewidth=1, label="Pareto front")
    for point in points:
        style = style_of(point.method, point.adapter, adapters) | {"linestyle": "none"}
        axes.plot(point.evaluations, point.quality, marker=marker_of(point.method), markersize=8, **style)
        if point.scale is not None and point.method != NONE:
            place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 7}
            axes.annotate(f"{point.scale:g}", (point.evaluations, point.quality), **place)
    focus(axes, points, measure)
    axes.set_xlabel("denoiser evaluations per image")
    better = "lower is better" if measure.lower else "higher is better"
    at = "mean over the scales" if measure.averaged else "at the scale beside each point"
    axes.set_title(f"{measure.name} ({better}),\n{at}", fontsize=9)
    axes.grid(alpha=0.3)


def focus(axes: Any, points: list[Point], measure: Quality) -> None:
    """Limit the axis to the guided methods; no guidance, mostly far from them, is written at the edge.

    A tenth of the largest value is shown at least, so that noise does not look like a difference.
    """
    values = [point.quality for point in points if point.method != NONE]
    margin = max(0.2 * (max(values) - min(values)), 0.05 * max(map(abs, values))) or 1.0
    low, high = min(values) - margin, max(values) + margin
    axes.set_ylim(low, high)
    for point in points:
        if point.method == NONE and not low <= point.quality <= high:
            above = point.quality > high
            place = {"xycoords": ("data", "axes fraction"), "va": "top" if above else "bottom", "fontsize": 7}
            text = f"no guidance: {point.quality:{measure.format}}"
            axes.annotate(text, (point.evaluations, 0.98 if above else 0.02), **place)


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
