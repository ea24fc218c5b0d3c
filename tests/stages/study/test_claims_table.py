"""The claims of a finished study, printed in Markdown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.study.claims_table import Claim, read_claims, to_markdown, to_text

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "tests/benchmarks/results/claims/claims.json"
CLAIMS = [Claim("It works", "at least 1", "2", True), Claim("It is fast", "at most 1 s", "3 s", False)]


def print_table(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.study.claims_table", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_claim_is_a_line_and_a_row() -> None:
    assert to_text(CLAIMS).splitlines() == [
        "holds: It works (at least 1): 2",
        "does not hold: It is fast (at most 1 s): 3 s",
    ]
    assert to_markdown(CLAIMS).splitlines() == [
        "|  | claim | goal | found |",
        "| --- | --- | --- | --- |",
        "| holds | It works | at least 1 | 2 |",
        "| **does not hold** | It is fast | at most 1 s | 3 s |",
    ]


def test_the_command_prints_the_committed_claims() -> None:
    done = print_table(str(COMMITTED))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == to_markdown(read_claims(COMMITTED)) + "\n"
    assert len(done.stdout.splitlines()) == 2 + len(json.loads(COMMITTED.read_bytes())["claims"])


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"claims": [1]}', '{"claims": [{"text": "x"}]}'])
def test_another_file_is_refused_in_a_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    if content is not None:
        path.write_text(content)
    done = print_table(str(path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: no claims.json of a study: name one, such as ")
    assert len(done.stderr.splitlines()) == 1
