"""How each method looks in every plot."""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps

from stages.evaluate.methods import (
    CFG,
    CFG_ADAPTIVE,
    CFG_EVERY,
    CFG_FIRST,
    CFG_INTERVAL,
    NONE,
    ONE_PASS,
    ONE_PASS_INTERVAL,
    parse,
    title_of,
    uses_adapter,
)

COLOURS = {NONE: "#888888", CFG: "#1f6fb4"}
SHADES = {CFG_FIRST: "Blues", CFG_INTERVAL: "Purples", CFG_ADAPTIVE: "RdPu", CFG_EVERY: "Greens"}
MARKERS = {
    NONE: "X",
    CFG: "s",
    CFG_FIRST: "<",
    CFG_INTERVAL: "D",
    CFG_ADAPTIVE: "P",
    CFG_EVERY: "^",
    ONE_PASS: "o",
    ONE_PASS_INTERVAL: "v",
}
COLOURS_OF_ADAPTERS = (
    "#d9541e",
    "#2a9d4a",
    "#8e44ad",
    "#c0a000",
    "#c2185b",
    "#00897b",
    "#5d4037",
    "#37474f",
    "#f39c12",
)


def style_of(method: str, adapter: str | None, adapters: list[str]) -> dict[str, Any]:
    """Colour, label and line style of a method, the same in every plot."""
    kind, numbers = parse(method)
    label = title_of(method, adapter, adapters)
    if uses_adapter(method):
        number = adapters.index(adapter) if adapter in adapters else 0
        dashed = "--" if kind == ONE_PASS_INTERVAL else "-"
        return {"color": COLOURS_OF_ADAPTERS[number % len(COLOURS_OF_ADAPTERS)], "label": label, "linestyle": dashed}
    if kind in COLOURS:
        return {"color": COLOURS[kind], "label": label, "linestyle": "-" if kind == CFG else "--"}
    return {
        "color": colormaps[SHADES[kind]](0.35 + 0.6 * share_guided(kind, numbers)),
        "label": label,
        "linestyle": "--",
    }


def marker_of(method: str) -> str:
    return MARKERS[parse(method)[0]]


def share_guided(kind: str, numbers: tuple[float, ...]) -> float:
    """The share of guided steps, as far as the numbers tell it: the darker the colour."""
    if kind == CFG_ADAPTIVE:
        return min(numbers[0], 1.0) ** 50
    if kind == CFG_EVERY:
        return 1 / numbers[0]
    return (numbers[-1] - (numbers[0] if kind == CFG_INTERVAL else 0)) / 100
