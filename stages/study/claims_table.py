"""A study's claims as tables."""

from __future__ import annotations

from typing import NamedTuple

VERDICTS = {True: "holds", False: "does not hold", None: "not judged"}


class Claim(NamedTuple):
    """A claim: its text, the goal that it must reach, the figures found, and whether they reach it; None if not judged."""

    text: str
    goal: str
    found: str
    holds: bool | None


def to_text(claims: list[Claim]) -> str:
    """One line per claim, for a terminal."""
    return "\n".join(
        f"{VERDICTS[claim.holds]}: {claim.text}{f' ({claim.goal})' if claim.goal else ''}: {claim.found}"
        for claim in claims
    )


def to_markdown(claims: list[Claim]) -> str:
    rows = [[VERDICTS[claim.holds], claim.text, claim.goal, claim.found] for claim in claims]
    return markdown_table([["verdict", "claim", "goal", "found"], *rows])


def markdown_table(cells: list[list[str]]) -> str:
    """A Markdown table whose first row is the header."""
    header, *rows = [f"| {' | '.join(map(in_a_cell, row))} |" for row in cells]
    return "\n".join([header, "| --- " * len(cells[0]) + "|", *rows])


def in_a_cell(text: str) -> str:
    """A text in one line, without a bar that would end its cell."""
    return " ".join(text.split()).replace("|", "\\|")
