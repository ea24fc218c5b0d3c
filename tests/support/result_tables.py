"""The tables of the pages, from the results of `tests/benchmarks/results`.

python -m tests.support.result_tables demo|emoji|default|variants|claims|outside|scale|teachers|guidance|memory|sizes
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.evaluate.report import cells_of
from stages.study.claims_table import Claim, markdown_table, to_markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COLUMNS = (
    "method",
    "guidance_scale",
    "frechet_distance",
    "class_accuracy",
    "retrieval_top1",
    "category_accuracy",
    "gap_closed",
    "effective_scale",
    "denoiser_evaluations",
    "fused",
    "time_relative_to_none",
)
EMBEDDED = Path(__file__).parents[2] / "stages" / "embedded"
TEACHERS = ("mnist_dit", "mnist_dit_bold", "mnist_sd")
MEASURES = {
    "frechet_distance": ("Frechet distance", 1),
    "class_accuracy": ("class accuracy", 3),
    "stroke": ("stroke accuracy", 3),
    "slant": ("slant accuracy", 3),
}
Row = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def study_rows(evaluation: str) -> list[Row]:
    return [row for row in read("claims/claims.json")["rows"] if row["evaluation"] == evaluation]


def comparison(rows: list[Row]) -> str:
    """Return the rows of an evaluation, with some of their columns."""
    return markdown_table(cells_of([{key: row[key] for key in COLUMNS if key in row} for row in rows]))


def per_scale(rows: list[Row], key: str, decimals: int) -> str:
    """The means over the seeds at each scale."""
    at_scale: dict[float, list[float]] = {}
    for row in rows:
        at_scale.setdefault(row["guidance_scale"], []).append(row[key])
    return " / ".join(f"{statistics.fmean(at_scale[scale]):.{decimals}f}" for scale in sorted(at_scale))


def variants() -> str:
    """Return one row per variant, with its values at each scale, beside no guidance and two passes."""
    rows = study_rows("variants")
    none, guided = ([row for row in rows if row["method"] == method] for method in ("none", "cfg"))
    cells = [["variant", "parameters", "gap closed", "Frechet distance", "time"]]
    for name, own in [("no guidance", none), ("guided, two passes", guided), *by_name(rows)]:
        size = f"{own[0]['parameters']:,}, {own[0]['share']:.1%}" if own[0]["share"] else ""
        time = statistics.median(row["time_relative_to_none"] for row in own)
        gap, distance = per_scale(own, "gap_closed", 3), per_scale(own, "frechet_distance", 1)
        cells.append([f"`{name}`" if size else name, size, gap, distance, f"{time:.2f}x"])
    return markdown_table(cells)


def by_name(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Return the rows of each adapter, sorted by gap closed."""
    names = dict.fromkeys(row["name"] for row in rows if row["method"] == "one_pass")
    own = [(name, [row for row in rows if row["name"] == name]) for name in names]
    return sorted(own, key=lambda pair: statistics.fmean(row["gap_closed"] for row in pair[1]))


def default() -> str:
    """Return the means over the seeds of the default adapter beside CFG, by scale, with their largest deviation."""
    rows = read("default/digits.json")["rows"]
    cells = [["scale", "gap closed", "largest deviation", "Frechet distance", "of CFG"]]
    for guided in (row for row in rows if row["method"] == "cfg"):
        scale = guided["guidance_scale"]
        own = [row for row in rows if row["method"] == "one_pass" and row["guidance_scale"] == scale]
        gaps = [row["gap_closed"] for row in own]
        mean = statistics.fmean(gaps)
        distance = statistics.fmean(row["frechet_distance"] for row in own)
        spread = max(abs(gap - mean) for gap in gaps)
        theirs = guided["frechet_distance"]
        cells.append([f"{scale:g}", f"{mean:.3f}", f"{spread:.4f}", f"{distance:.1f}", f"{theirs:.1f}"])
    return markdown_table(cells)


def claims() -> str:
    """Return the claims of the study, as it words them."""
    return to_markdown([Claim(**claim) for claim in read("claims/claims.json")["claims"]])


def outside() -> str:
    """Return the gap closed and the Frechet distance above the trained scales, by rule, beside CFG's distance."""
    found = read("outside_scales/digits.json")
    cells = [["scale", "straight on up to 8", "held at 4.5", "straight on without end", "CFG"]]
    for guided in (row for row in found["twice"] if row["method"] == "cfg"):
        scale = guided["guidance_scale"]
        own = [one_pass_at(found[rule], scale) for rule in ("twice", "held", "endless")]
        pairs = [f"{row['gap_closed']:.3f}, {row['frechet_distance']:.1f}" for row in own]
        cells.append([f"{scale:g}", *pairs, f"{guided['frechet_distance']:.1f}"])
    return markdown_table(cells)


def one_pass_at(rows: list[Row], scale: float) -> Row:
    (row,) = (row for row in rows if row["method"] == "one_pass" and row["guidance_scale"] == scale)
    return row


def scale() -> str:
    """Return the driver's share by the number of workers."""
    cells = [["workers", "units", "share of the workers' time in units", "CPU time of the driver per unit"]]
    for row in read("scale/scale.json")["workers"]:
        milliseconds = f"{row['driver_cpu_milliseconds_per_unit']:.1f} ms"
        cells.append([str(row["workers"]), f"{row['units']:,}", f"{row['efficiency']:.3f}", milliseconds])
    return markdown_table(cells)


def teachers() -> str:
    """Return the effect of guidance on the embedded teachers, by scale, as measured when they were trained."""
    measured = {name: json.loads((EMBEDDED / name / "training.json").read_text())["guidance"] for name in TEACHERS}
    scales = [f"{row['guidance_scale']:g}" for row in measured[TEACHERS[0]]]
    cells = [["model", "measure by scale", *scales]]
    for name, rows in measured.items():
        for key, (title, decimals) in MEASURES.items():
            if key in rows[0]:
                cells.append([f"`{name}`", title, *(f"{row[key]:.{decimals}f}" for row in rows)])
    return markdown_table(cells)


def guidance() -> str:
    """Return the effect of guidance on the teacher `emoji`, by scale."""
    keys = ("guidance_scale", "frechet_distance", "retrieval_top1", "retrieval_top5", "category_accuracy")
    rows = [row for row in read("emoji/evaluation.json")["rows"] if row["method"] in ("none", "cfg")]
    return markdown_table(cells_of([{key: row[key] for key in keys} for row in rows]))


def memory() -> str:
    """Return the modelled peak of a training step beside its goal, for each way to hold the base that has one."""
    titles = {"none": "bf16", "offload": "bf16, `enable_group_offload=true`"}
    cells = [["base", "held in", "peak", "goal"]]
    for row in read("memory/goals.json")["rows"]:
        held = titles.get(row["held"], f"`quantization={row['held']}`")
        cells.append([row["shape"], held, f"{row['peak'] / 1e9:.1f} GB", f"{row['goal'] / 1e9:.0f} GB"])
    return markdown_table(cells)


def sizes() -> str:
    """Return the gap closed at each size by the adapters of one and of two sizes: mean, lowest and highest."""
    rows = read("several_sizes/emoji.json")["rows"]
    cells = [["evaluated at", *(f"trained at {' and '.join(trained)}" for trained in trained_sizes(rows))]]
    for size in dict.fromkeys(named(row["size"]) for row in rows):
        own = [row["gap_closed"] for row in rows if named(row["size"]) == size]
        cells.append([size, *(f"{statistics.fmean(gaps):.3f} ({min(gaps):.3f} to {max(gaps):.3f})" for gaps in own)])
    return markdown_table(cells)


def trained_sizes(rows: list[Row]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(map(named, row["trained"])) for row in rows))


def named(size: list[int]) -> str:
    return "x".join(map(str, size))


TABLES: dict[str, Callable[[], str]] = {
    "demo": lambda: comparison(read("mnist_dit/evaluation.json")["rows"]),
    "emoji": lambda: comparison(read("emoji/evaluation.json")["rows"]),
    "default": default,
    "variants": variants,
    "claims": claims,
    "outside": outside,
    "scale": scale,
    "teachers": teachers,
    "guidance": guidance,
    "memory": memory,
    "sizes": sizes,
}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m tests.support.result_tables {'|'.join(TABLES)}")
    print(TABLES[sys.argv[1]]())
