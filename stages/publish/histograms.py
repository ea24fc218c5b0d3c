"""Histograms as pictures."""

from __future__ import annotations

import io
from typing import Any

from stages.errors import UserError

COLOUR = "#1f6fb4"
MOST_NAMES = 40  # that can be told apart below an axis


def plot(name: str, histogram: Any) -> bytes:
    """Draw a histogram of `verification.json` as a PNG: a list of bins, or counts by name.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # here, because an adapter has no histograms
    except ModuleNotFoundError as error:
        raise UserError("the card's pictures: matplotlib is not installed: pip install '.[evaluate]'") from error
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    if isinstance(histogram, dict):
        places = range(len(histogram))
        axes.bar(places, list(histogram.values()), color=COLOUR)
        axes.set_xticks(places if len(histogram) <= MOST_NAMES else [])
        axes.set_xticklabels(list(histogram) if len(histogram) <= MOST_NAMES else [], fontsize=7)
    else:
        starts, ends = ([bin[end] for bin in histogram] for end in ("from", "to"))
        widths = [end - start for start, end in zip(starts, ends, strict=True)]
        axes.bar(starts, [bin["count"] for bin in histogram], widths, align="edge", color=COLOUR, edgecolor="white")
    axes.set_xlabel(name)
    axes.set_ylabel("records" if name == "timestep" else "samples")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
