"""The report of a study: its claims, what they were judged by, and each evaluation, in one file that opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.evaluate.claims import Claim
from stages.evaluate.report import (
    PLOTS,
    Row,
    as_pictures,
    as_source,
    cells_of,
    plot_over_scale,
    plot_over_time,
    render,
)
from stages.records.storage import whole_file

VERDICTS = {True: "holds", False: "does not hold"}


def table_of_claims(claims: list[Claim]) -> str:
    """The claims as lines for a terminal."""
    return "\n".join(f"{VERDICTS[claim.holds]}: {claim.text} ({claim.goal}): {claim.found}" for claim in claims)


def write_study_report(folder: Path, rows: list[Row], claims: list[Claim], about: dict[str, Any]) -> Path:
    """Write `claims.html`, one self-contained file, from the rows and from the grids of images that the evaluations left."""
    names = dict.fromkeys(row["evaluation"] for row in rows)
    sections = [
        section(name, folder / "evaluations" / name, [r for r in rows if r["evaluation"] == name]) for name in names
    ]
    path = folder / "claims.html"
    with whole_file(path) as file:
        file.write(render("study_report.html.j2", claims=claims, verdicts=VERDICTS, sections=sections, about=about))
    return path


def section(name: str, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """What the report tells of one evaluation; its grids have the rows of the table, in their order."""
    scales = sorted({curve["guidance_scale"] for row in rows for curve in row["error_by_timestep"]})
    plots = {key: (PLOTS[key], plot_over_scale(rows, key)) for key in ("frechet_distance", "gap_closed")}
    plots |= {
        f"error_{scale}": (f"distance to CFG at scale {scale:g}", plot_over_time(rows, scale)) for scale in scales
    }
    grids = [
        {
            "title": f"from the same noise, scale {scale:g}: the table's rows in their order",
            "source": as_source(png.read_bytes()),
        }
        for scale in scales
        if (png := folder / f"grid_at_scale_{scale:g}.png").exists()
    ]
    return {"name": name, "cells": cells_of(rows), "pictures": as_pictures(plots) + grids}
