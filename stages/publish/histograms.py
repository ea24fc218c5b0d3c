"""Histograms as pictures."""

from __future__ import annotations

import io
from typing import Any

from stages.errors import UserError

COLOUR = "#1f6fb4"
MOST_NAMES, LONGEST_ROW = 40, 60  # names that can be told apart below an axis, and their characters in one row


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
        names = list(histogram) if len(histogram) <= MOST_NAMES else []
        axes.stairs(list(histogram.values()), fill=True, color=COLOUR)
        axes.set_xticks([place + 0.5 for place in range(len(names))], names, fontsize=7)
        axes.tick_params(axis="x", rotation=90 if sum(map(len, names)) > LONGEST_ROW else 0)
    else:
        edges = [histogram[0]["from"], *(bin["to"] for bin in histogram)]
        axes.stairs([bin["count"] for bin in histogram], edges, fill=True, color=COLOUR)
    axes.set_xlabel(name)
    axes.set_ylabel("records" if name == "timestep" else "samples")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
