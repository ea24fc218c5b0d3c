"""The report: a table, plots and images in one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
from torch import Tensor

from stages.base.pictures import grid, to_picture
from stages.evaluate import pareto
from stages.evaluate.comparisons import Setting
from stages.evaluate.methods import CFG, NONE, parse, title_of
from stages.evaluate.preference import PREFERENCE
from stages.evaluate.styles import style_of
from stages.storage.files import whole_file

matplotlib.use("Agg")

from matplotlib import pyplot as plt


class Column(NamedTuple):
    """A column of the table: its title, and the format of its values."""

    title: str
    format: Callable[[Any], str]


COLUMNS = {
    "method": Column("method", title_of),
    "adapter": Column("adapter", lambda name: name or ""),
    "share": Column("of the base", lambda share: "" if share is None else f"{share:.1%}"),
    "guidance_scale": Column("scale", "{:g}".format),
    "frechet_distance": Column("Frechet distance", "{:.1f}".format),
    "kernel_distance": Column("kernel distance", "{:.4g}".format),
    "inception_score": Column("IS", "{:.2f}".format),
    "precision": Column("precision", "{:.3f}".format),
    "recall": Column("recall", "{:.3f}".format),
    "retrieval_top1": Column("retrieval, top 1", "{:.3f}".format),
    "retrieval_top5": Column("top 5", "{:.3f}".format),
    "category_accuracy": Column("category", "{:.3f}".format),
    "clip_score": Column("CLIP score", "{:.2f}".format),
    "class_accuracy": Column("class accuracy", "{:.3f}".format),
    "gap_closed": Column("gap closed", lambda gap: "none" if gap is None else f"{gap:.3f}"),
    "effective_scale": Column("effective scale", "{:.2f}".format),
    "denoiser_evaluations": Column("evaluations", "{:.4g}".format),
    "fused": Column("fused", lambda fused: "" if fused is None else "yes" if fused else "no"),
    "time_relative_to_none": Column("time", "{:.2f}x".format),
}
PLOTS = {
    "frechet_distance": "Frechet distance to real images (lower is better)",
    "kernel_distance": "kernel distance to real images (lower is better)",
    "precision": "precision: share of images inside the real manifold",
    "recall": "recall: share of real images inside the generated manifold",
    "class_accuracy": "share of images of the requested class",
    "retrieval_top1": "share of images nearest to a real image of their prompt",
    "category_accuracy": "share of images nearest to a real image of their category",
    "clip_score": "CLIP score of images and prompts",
    "gap_closed": "gap closed in the final latents",
    "effective_scale": "effective scale: scale of the nearest CFG",
}
Row = dict[str, Any]


def adapters_in(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["adapter"] for row in rows if row.get("adapter")))


def cells_of(rows: list[Row]) -> list[list[str]]:
    """The table's cells, header first, without columns that no row has and without the name of a single adapter."""
    scores = [name for name in rows[0] if name.startswith(PREFERENCE)]
    columns = COLUMNS | {name: Column(name.removeprefix(PREFERENCE), "{:.4g}".format) for name in scores}
    shown = {name: column for name, column in columns.items() if name in rows[0]}
    if len(adapters_in(rows)) < 2:
        shown.pop("adapter", None)
    head = [column.title for column in shown.values()]
    return [head, *([column.format(row[name]) for name, column in shown.items()] for row in rows)]


def table(rows: list[Row]) -> str:
    """The rows as an aligned text table."""
    cells = cells_of(rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def plot_over_scale(rows: list[Row], quantity: str) -> bytes:
    """A PNG plot of a quantity against the scale, a line per method and adapter; no guidance is a horizontal line."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    adapters = adapters_in(rows)
    for method, adapter in dict.fromkeys((row["method"], row.get("adapter")) for row in rows):
        found = [row for row in rows if (row["method"], row.get("adapter")) == (method, adapter)]
        style = style_of(method, adapter, adapters)
        if method == NONE:
            axes.axhline(found[0][quantity], **style)
        else:
            points = sorted((row["guidance_scale"], row[quantity]) for row in found)
            axes.plot(*zip(*points, strict=True), marker="o", **style)
    axes.set_xlabel("guidance scale")
    axes.set_title(PLOTS[quantity], fontsize=10)
    return finished(figure, axes)


def plot_over_time(rows: list[Row], scale: float) -> bytes:
    """A PNG plot of the distance to CFG at a scale against the timestep, from noise to images."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    adapters = adapters_in(rows)
    for row in rows:
        for curve in row["error_by_timestep"]:
            if curve["guidance_scale"] == scale:
                style = style_of(row["method"], row.get("adapter"), adapters)
                errors = [error or float("nan") for error in curve["error"]]  # a logarithmic axis has no zero
                axes.plot(curve["timestep"], errors, marker=".", **style)
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("timestep")
    axes.set_title(f"mean squared distance to CFG at scale {scale:g}", fontsize=10)
    return finished(figure, axes)


def finished(figure: Any, axes: Any) -> bytes:
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    return content.getvalue()


class Grid(NamedTuple):
    """Images of every method at a scale, from the same noise: a titled row per method."""

    scale: float
    titles: list[str]
    png: bytes

    @property
    def source(self) -> str:
        return as_source(self.png)


def grid_at(shown: dict[Setting, Tensor], scale: float) -> Grid:
    lines = [setting for setting in shown if setting.method == NONE or setting.guidance_scale == scale]
    adapters = list(dict.fromkeys(setting.adapter for setting in shown if setting.adapter))
    pictures = [[to_picture(image.float() / 127.5 - 1) for image in shown[setting]] for setting in lines]
    sheet = io.BytesIO()
    grid(pictures).save(sheet, format="png")
    titles = [title_of(setting.method, setting.adapter, adapters) for setting in lines]
    return Grid(scale, titles, sheet.getvalue())


def write_report(folder: Path, rows: list[Row], shown: dict[Setting, Tensor], metadata: dict[str, Any]) -> Path:
    """Write `report.html`, a self-contained file, and its plots and grids as separate files, too.

    Args:
        shown: images of each setting, bytes `[k, c, h, w]`.

    Returns:
        The path of the page.
    """
    scales = sorted({setting.guidance_scale for setting in shown if setting.method == CFG})
    over_scale = {name: (title, plot_over_scale(rows, name)) for name, title in PLOTS.items() if name in rows[0]}
    over_time = {f"error_at_scale_{s:g}": (f"distance to CFG at scale {s:g}", plot_over_time(rows, s)) for s in scales}
    grids = [grid_at(shown, scale) for scale in scales]
    pictures = {name: content for name, (_, content) in (over_scale | over_time).items()}
    pictures["pareto"] = pareto.plot(rows)
    pictures |= {f"grid_at_scale_{grid.scale:g}": grid.png for grid in grids}
    for name, content in pictures.items():
        with whole_file(folder / f"{name}.png") as file:
            file.write(content)
    page = render(
        Path(__file__).with_name("report.html.j2"),
        rows=rows,
        cells=cells_of(rows),
        over_scale=as_pictures(over_scale),
        over_time=as_pictures(over_time),
        grids=grids,
        pareto={
            "sentences": pareto.sentences(rows, metadata["num_samples"]),
            "cells": pareto.cells(rows),
            "source": as_source(pictures["pareto"]),
        },
        kinds={parse(row["method"])[0] for row in rows},
        metadata=metadata,
    )
    path = folder / "report.html"
    with whole_file(path) as file:
        file.write(page)
    return path


def render(template: Path, **values: Any) -> bytes:
    """Render a template, which may include templates of its own folder and of this one."""
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return templates.get_template(template.name).render(**values).encode()


def as_pictures(plots: dict[str, tuple[str, bytes]]) -> list[dict[str, str]]:
    return [{"title": title, "source": as_source(content)} for title, content in plots.values()]


def as_source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
