"""The report: a table, plots and images in one file that opens anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
from torch import Tensor

from stages.evaluate.comparisons import CFG, NONE, ONE_PASS, Setting
from stages.pictures import grid, to_picture
from stages.records.storage import whole_file

matplotlib.use("Agg")

from matplotlib import pyplot as plt


class Column(NamedTuple):
    """A column of the table: its head, and how a value is told."""

    title: str
    told: Callable[[Any], str]


TITLES = {NONE: "no guidance", CFG: "guided, two passes", ONE_PASS: "one pass"}
COLOURS = {NONE: "#888888", CFG: "#1f6fb4", ONE_PASS: "#d9541e"}
COLUMNS = {
    "method": Column("method", TITLES.__getitem__),
    "guidance_scale": Column("scale", "{:g}".format),
    "frechet_distance": Column("Frechet distance", "{:.1f}".format),
    "class_accuracy": Column("class accuracy", "{:.3f}".format),
    "stroke_accuracy": Column("stroke", "{:.3f}".format),
    "slant_accuracy": Column("slant", "{:.3f}".format),
    "gap_closed": Column("gap closed", "{:.3f}".format),
    "denoiser_evaluations": Column("evaluations", "{:g}".format),
    "time_relative_to_none": Column("time", "{:.2f}x".format),
}
PLOTS = {
    "frechet_distance": "Frechet distance to real images (lower is better)",
    "class_accuracy": "share of images of the class asked for",
    "gap_closed": "gap closed in the final latents",
}


def cells_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, its head first; columns that no row has are left out."""
    shown = {name: column for name, column in COLUMNS.items() if name in rows[0]}
    head = [column.title for column in shown.values()]
    return [head, *([column.told(row[name]) for name, column in shown.items()] for row in rows)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text with aligned columns, for a terminal."""
    cells = cells_of(rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def plot(rows: list[dict[str, Any]], quantity: str) -> bytes:
    """A quantity against the scale as PNG, a line per method; what has no scale is a level."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for method in (NONE, CFG, ONE_PASS):
        points = [(row["guidance_scale"], row[quantity]) for row in rows if row["method"] == method]
        if method == NONE:
            axes.axhline(points[0][1], color=COLOURS[method], linestyle="--", label=TITLES[method])
        else:
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=COLOURS[method], label=TITLES[method])
    axes.set_xlabel("guidance scale")
    axes.set_title(PLOTS[quantity], fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    return content.getvalue()


def write_report(folder: Path, rows: list[dict[str, Any]], shown: dict[Setting, Tensor], about: dict[str, Any]) -> Path:
    """Write `report.html`, one self-contained file, with the plots as files beside it."""
    pictures = []
    for quantity, title in PLOTS.items():
        content = plot(rows, quantity)
        with whole_file(folder / f"{quantity}.png") as file:
            file.write(content)
        pictures.append({"title": title, "source": as_source(content)})
    grids = []
    for scale in sorted({setting.guidance_scale for setting in shown if setting.method == CFG}):
        lines = [shown[Setting(NONE, 1.0)], shown[Setting(CFG, scale)], shown[Setting(ONE_PASS, scale)]]
        sheet = io.BytesIO()
        grid([[to_picture(image) for image in line] for line in lines]).save(sheet, format="png")
        grids.append({"scale": scale, "source": as_source(sheet.getvalue())})
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = templates.get_template("report.html.j2").render(
        rows=rows, cells=cells_of(rows), titles=TITLES, plots=pictures, grids=grids, about=about
    )
    path = folder / "report.html"
    with whole_file(path) as file:
        file.write(page.encode())
    return path


def as_source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
