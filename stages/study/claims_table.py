"""A study's claims as tables.

    python -m stages.study.claims_table runs/claims/claims.json

prints the claims of a finished study in Markdown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

VERDICTS = {True: "holds", False: "does not hold"}


class Claim(NamedTuple):
    """A judged claim: its text, the goal that it must reach, the figures found, and whether they reach the goal."""

    text: str
    goal: str
    found: str
    holds: bool


def to_text(claims: list[Claim]) -> str:
    """One line per claim, for a terminal."""
    return "\n".join(f"{VERDICTS[claim.holds]}: {claim.text} ({claim.goal}): {claim.found}" for claim in claims)


def to_markdown(claims: list[Claim]) -> str:
    """The claims as a Markdown table; the verdict of a claim that does not hold is bold."""
    verdicts = VERDICTS | {False: f"**{VERDICTS[False]}**"}
    return markdown_table(
        [["", "claim", "goal", "found"], *([verdicts[c.holds], c.text, c.goal, c.found] for c in claims)]
    )


def markdown_table(cells: list[list[str]]) -> str:
    """A Markdown table whose first row is the header."""
    header, *rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([header, "| --- " * len(cells[0]) + "|", *rows])


def read_claims(path: Path) -> list[Claim]:
    """
    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not the `claims.json` of a study.
    """
    try:
        return [Claim(**claim) for claim in json.loads(path.read_bytes())["claims"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: holds no claims") from error


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m stages.study.claims_table CLAIMS_JSON")
    try:
        print(to_markdown(read_claims(Path(sys.argv[1]))))
    except (OSError, ValueError) as error:
        sys.exit(
            f"error: {sys.argv[1]}: no claims.json of a study: name one, such as runs/claims/claims.json ({error})"
        )


if __name__ == "__main__":
    main()
