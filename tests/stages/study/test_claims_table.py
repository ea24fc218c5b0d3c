from __future__ import annotations

from stages.study.claims_table import Claim, to_markdown, to_text

CLAIMS = [
    Claim("It works", "at least 1", "2", True),
    Claim("It is fast", "at most 1 s", "3 s", False),
    Claim("It is light", "", "the evaluation has no share", None),
]


def test_a_claim_has_a_line_and_a_row() -> None:
    assert to_text(CLAIMS).splitlines() == [
        "holds: It works (at least 1): 2",
        "does not hold: It is fast (at most 1 s): 3 s",
        "not judged: It is light: the evaluation has no share",
    ]
    assert to_markdown(CLAIMS).splitlines() == [
        "| verdict | claim | goal | found |",
        "| --- | --- | --- | --- |",
        "| holds | It works | at least 1 | 2 |",
        "| does not hold | It is fast | at most 1 s | 3 s |",
        "| not judged | It is light |  | the evaluation has no share |",
    ]


def test_a_text_stays_in_its_cell() -> None:
    (_, _, line) = to_markdown([Claim("a|b\nc", "", "", True)]).splitlines()
    assert line == "| holds | a\\|b c |  |  |"
