"""The faults that the tests inject, and how many of them generation and datasets survived.

python -m tests.support.faults_table        prints the table of tests/README.md from the committed result
python -m tests.support.faults_table run    runs the tests that inject faults and writes that result

`run` fails if a fault was not survived.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict
from xml.etree import ElementTree

VARIABLE = "FAULTS_TABLE"
KINDS = ("worker", "node", "driver", "storage", "dataset")
RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "faults" / "faults.json"


class Fault(TypedDict):
    """A fault, what it happens to, and how often it was injected and survived in one run of the tests."""

    kind: str
    fault: str
    injected: int
    survived: int


def survived(name: str, kind: str) -> None:
    """Record at the end of a test that a fault was injected, and that everything was in order afterwards."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a") as file:
            file.write(json.dumps({"fault": name, "kind": kind}) + "\n")


def failures(report: Path) -> list[tuple[str, str]]:
    """Return (file, test) of each test that failed, because it ended before it named its fault."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [(case.attrib["classname"], case.attrib["name"]) for case in failed]


def count(lines: Iterable[str], failed: list[tuple[str, str]]) -> list[Fault]:
    """Count what `survived` wrote, and the tests that failed, by kind and name."""
    passed = Counter((entry["kind"], entry["fault"]) for entry in map(json.loads, lines))
    injected = passed + Counter(failed)
    kinds = dict.fromkeys([*KINDS, *sorted(kind for kind, _ in injected)])
    return [
        {"kind": kind, "fault": fault, "injected": times, "survived": passed[kind, fault]}
        for kind in kinds
        for (of, fault), times in sorted(injected.items())
        if of == kind
    ]


def to_markdown(faults: list[Fault]) -> str:
    """Return the totals and a table with one row per fault."""
    totals = [sum(fault[key] for fault in faults) for key in ("injected", "survived")]  # type: ignore[literal-required]
    rows = [f"| {f['kind']} | {f['fault']} | {f['injected']} | {f['survived']} |" for f in faults]
    head = ["| happens to | fault | injected | survived |", "| --- | --- | --- | --- |"]
    return "\n".join([f"{totals[0]} faults injected, {totals[1]} survived.", "", *head, *rows])


def run_tests() -> int:
    """Run the tests that inject faults, write what they survived to `RESULT`, and return pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        lines, report = Path(folder) / "lines", Path(folder) / "report.xml"
        lines.touch()
        tests = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "survived(" in path.read_text()]
        command = [sys.executable, "-m", "pytest", "-m", "not zoo", f"--junitxml={report}", *tests]
        status = subprocess.run(command, env=os.environ | {VARIABLE: str(lines)}, check=False).returncode
        faults = count(lines.read_text().splitlines(), failures(report))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(faults, indent=2) + "\n")
    return status


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        sys.exit(run_tests())
    print(to_markdown(json.loads(RESULT.read_text())))
