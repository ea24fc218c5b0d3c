"""What happened to generation and to datasets in a run of the tests, and what was left of it, as a table.

python -m tests.support.faults_table    runs the tests that inject faults and prints Markdown; fails where one was not survived
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

VARIABLE = "FAULTS_TABLE"
KINDS = ("worker", "node", "driver", "storage", "dataset")


def survived(name: str, kind: str) -> None:
    """Tell that a fault was injected, and that the test which did it found everything as it has to be afterwards."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a") as file:
            file.write(json.dumps({"fault": name, "kind": kind, "survived": True}) + "\n")


def failures(report: Path) -> list[tuple[str, str]]:
    """(kind, fault) of each test that failed, which tells no kind, so its file and name are told."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [(case.attrib["classname"], case.attrib["name"]) for case in failed]


def to_markdown(lines: list[str], failed: list[tuple[str, str]]) -> str:
    """One row per kind, with each of its faults."""
    passed = Counter((told["kind"], told["fault"]) for told in map(json.loads, lines))
    injected = passed + Counter(failed)
    kinds = dict.fromkeys([*KINDS, *sorted(kind for kind, _ in injected)])
    table = ["| what it happens to | faults | injected | survived |", "| --- | --- | --- | --- |"]
    for kind in kinds:
        faults = {fault: times for (of, fault), times in sorted(injected.items()) if of == kind}
        words = "; ".join(fault if times == 1 else f"{fault} ({times} times)" for fault, times in faults.items())
        survivals = sum(passed[kind, fault] for fault in faults)
        table.append(f"| {kind} | {words} | {sum(faults.values())} | {survivals} |")
    return "\n".join(table)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines, report = Path(folder) / "lines", Path(folder) / "report.xml"
        lines.touch()
        tests = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "survived(" in path.read_text()]
        words = [sys.executable, "-m", "pytest", "-m", "not zoo", f"--junitxml={report}", *tests]
        status = subprocess.run(
            words, env=os.environ | {VARIABLE: str(lines)}, stdout=sys.stderr, check=False
        ).returncode
        print(to_markdown(lines.read_text().splitlines(), failures(report)))
    sys.exit(status)


if __name__ == "__main__":
    main()
