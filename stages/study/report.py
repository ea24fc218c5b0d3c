"""The report of a study: its claims and its evaluations, as a self-contained HTML page and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from stages.evaluate.methods import ONE_PASS
from stages.evaluate.report import (
    PLOTS,
    Row,
    as_pictures,
    as_source,
    cells_of,
    finished,
    plot_over_scale,
    plot_over_time,
    render,
)
from stages.storage.files import whole_file
from stages.study.claims_table import VERDICTS, Claim, markdown_table, to_markdown

REPORTS = MARKDOWN, PAGE = "claims.md", "claims.html"


def write_study_report(folder: Path, rows: list[Row], claims: list[Claim], metadata: dict[str, Any]) -> Path:
    """Write `claims.html`, with plots and image grids, and `claims.md`, with tables of the means over seeds.

    Returns:
        The path of the page.
    """
    names = dict.fromkeys(row["evaluation"] for row in rows)
    sections = [
        section(name, folder / "evaluations" / name, [r for r in rows if r["evaluation"] == name]) for name in names
    ]
    with whole_file(folder / MARKDOWN) as file:
        file.write("\n\n".join(tables_of(claims, rows)).encode() + b"\n")
    path = folder / PAGE
    with whole_file(path) as file:
        file.write(
            render(
                Path(__file__).with_name("report.html.j2"),
                claims=claims,
                verdicts=VERDICTS,
                sections=sections,
                metadata=metadata,
            )
        )
    return path


def tables_of(claims: list[Claim], rows: list[Row]) -> Iterator[str]:
    """Markdown tables: the claims, then each evaluation."""
    if claims:
        yield to_markdown(claims)
    for name in dict.fromkeys(row["evaluation"] for row in rows):
        yield f"`{name}`\n\n" + markdown_table(cells_of(over_seeds([row for row in rows if row["evaluation"] == name])))


def section(name: str, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """One evaluation's section of the page: its table, plots of the means over seeds, and image grids."""
    means = over_seeds(rows)
    scales = sorted({curve["guidance_scale"] for row in means for curve in row["error_by_timestep"]})
    shown: list[str] = [key for key in ("frechet_distance", "gap_closed") if key in rows[0]]
    plots = {key: (PLOTS[key], plot_over_scale(means, key)) for key in shown}
    if "frechet_distance" in shown and len({row["teacher_evaluations"] for row in means if row["name"]}) > 1:
        plots["cost"] = ("Frechet distance against the teacher's evaluations", plot_over_cost(means))
    plots |= {
        f"error_{scale}": (f"distance to CFG at scale {scale:g}", plot_over_time(means, scale)) for scale in scales
    }
    grids = [
        {
            "title": f"images from the same noise at scale {scale:g}, in the order of the table",
            "source": as_source(png.read_bytes()),
        }
        for scale in scales
        if (png := folder / f"grid_at_scale_{scale:g}.png").exists()
    ]
    return {"name": name, "cells": cells_of(rows), "pictures": as_pictures(plots) + grids}


def over_seeds(rows: list[Row]) -> list[Row]:
    """Average the rows of an adapter's seeds at each scale, and name the adapter as the study's file does."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["guidance_scale"], row["name"]), []).append(row)
    return [
        group[0]
        | {"adapter": name}
        | {
            key: statistics.fmean(row[key] for row in group)
            for key, value in group[0].items()
            if isinstance(value, float) and None not in [row[key] for row in group]
        }
        | {"error_by_timestep": mean_curves([row["error_by_timestep"] for row in group])}
        for (_, _, name), group in groups.items()
    ]


def mean_curves(curves: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean at each timestep of curves that have the same scales."""
    return [
        same_scale[0] | {"error": [statistics.fmean(e) for e in zip(*(c["error"] for c in same_scale), strict=True)]}
        for same_scale in zip(*curves, strict=True)
    ]


def plot_over_cost(rows: list[Row]) -> bytes:
    """A PNG plot of the Frechet distance against the teacher's evaluations; a colour per scale."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    ones = [row for row in rows if row["method"] == ONE_PASS]
    for scale in sorted({row["guidance_scale"] for row in ones}):
        points = sorted(
            (row["teacher_evaluations"], row["frechet_distance"], row["name"])
            for row in ones
            if row["guidance_scale"] == scale
        )
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", linestyle="", label=f"scale {scale:g}")
        for evaluations, distance, name in points:
            axes.annotate(name, (evaluations, distance), fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("evaluations of the teacher")
    axes.set_title("Frechet distance against the teacher's evaluations", fontsize=10)
    return finished(figure, axes)
