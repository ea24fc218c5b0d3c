"""The names of the sampling methods, with their settings: `cfg_interval_20_80` is CFG from 20% to 80% of the timesteps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stages.errors import UsageError
from stages.evaluate.rules import Agreement, Every, FirstSteps, Interval, Rule

NONE, CFG, ONE_PASS = "none", "cfg", "one_pass"
CFG_FIRST_50, CFG_FIRST_60 = "cfg_first_50", "cfg_first_60"
COMPARED = (ONE_PASS, CFG_FIRST_50, CFG_FIRST_60)
CFG_FIRST, CFG_INTERVAL, CFG_ADAPTIVE, CFG_EVERY = "cfg_first", "cfg_interval", "cfg_adaptive", "cfg_every"
ONE_PASS_INTERVAL = "one_pass_interval"
NAME = re.compile(r"([a-z_]+?)((?:_[\d.]+)*)")


class Number(NamedTuple):
    """A number in a method's name: how it is written, and its bounds."""

    pattern: str
    lowest: float
    highest: float


PERCENT, COUNT = Number(r"0|[1-9]\d*", 0, 100), Number(r"0|[1-9]\d*", 1, 1000)
COSINE = Number(r"\d+(?:\.\d+)?", 0, 1)


class Kind(NamedTuple):
    """Methods of one kind: their numbers, an example, the title by the numbers, and how they guide by CFG."""

    numbers: tuple[Number, ...]
    example: str
    title: Callable[..., str]
    rule: Callable[..., Rule] | None = None


KINDS = {
    NONE: Kind((), NONE, lambda: "no guidance"),
    CFG: Kind((), CFG, lambda: "guided, two passes"),
    ONE_PASS: Kind((), ONE_PASS, lambda: "one pass"),
    CFG_FIRST: Kind((PERCENT,), CFG_FIRST_50, lambda percent: f"guided, first {percent:g}%", FirstSteps),
    CFG_INTERVAL: Kind((PERCENT, PERCENT), "cfg_interval_20_80", lambda a, b: f"guided, {a:g}% to {b:g}%", Interval),
    CFG_ADAPTIVE: Kind((COSINE,), "cfg_adaptive_0.99", lambda alike: f"guided until {alike:g} alike", Agreement),
    CFG_EVERY: Kind((COUNT,), "cfg_every_2", lambda period: f"guided every {ordinal(int(period))} step", Every),
    ONE_PASS_INTERVAL: Kind((PERCENT, PERCENT), "one_pass_interval_20_80", lambda a, b: f"one pass, {a:g}% to {b:g}%"),
}


def parse(method: str) -> tuple[str, tuple[float, ...]]:
    """The kind of a method and its numbers.

    Raises:
        UsageError: there is no such method, or a number is out of range.
    """
    match = NAME.fullmatch(method)
    kind, texts = (match[1], match[2].split("_")[1:]) if match else ("", [])
    known = KINDS[kind].numbers if kind in KINDS else None
    if known is None or len(texts) != len(known) or not all(map(re.fullmatch, [n.pattern for n in known], texts)):
        examples = [each.example for name, each in KINDS.items() if name not in (NONE, CFG)]
        raise UsageError(f"methods={method}: some of {', '.join(examples)}, or with other numbers")
    numbers = tuple(map(float, texts))
    for text, value, number in zip(texts, numbers, known, strict=True):
        if not number.lowest <= value <= number.highest:
            raise UsageError(f"methods={method}: {text} is out of range: {number.lowest:g} to {number.highest:g}")
    if kind in (CFG_INTERVAL, ONE_PASS_INTERVAL) and numbers[0] >= numbers[1]:
        raise UsageError(f"methods={method}: the interval is empty: the second number must be the larger one")
    return kind, numbers


def check_compared(methods: Sequence[str]) -> None:
    """
    Raises:
        UsageError: one of them is no method, or `none` or `cfg`, which need not be named.
    """
    for method in methods:
        if parse(method)[0] in (NONE, CFG):
            raise UsageError(f"methods={method}: none and cfg are always included: leave it out")


def uses_adapter(method: str) -> bool:
    return parse(method)[0] in (ONE_PASS, ONE_PASS_INTERVAL)


def rule_of(method: str) -> Rule | None:
    """A new rule by which a method guides some steps by CFG; None if it guides all or none so."""
    kind, numbers = parse(method)
    new = KINDS[kind].rule
    return None if new is None else new(*numbers)


def interval_of(method: str) -> Interval | None:
    """The interval in which a method guides by one pass; None if it guides all steps or by other means."""
    kind, numbers = parse(method)
    return Interval(*numbers) if kind == ONE_PASS_INTERVAL else None


def title_of(method: str, adapter: str | None = None, adapters: list[str] | None = None) -> str:
    """A method in words, with its adapter's name if there are several adapters."""
    kind, numbers = parse(method)
    title = KINDS[kind].title(*numbers)
    return f"{title}, {adapter}" if uses_adapter(method) and len(adapters or []) > 1 else title


def ordinal(number: int) -> str:
    return f"{number}{'th' if 10 < number % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
