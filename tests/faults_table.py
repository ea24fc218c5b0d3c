"""What happened to generation and to datasets in a run of the tests, and what was left of it, as a table.

python -m tests.faults_table    runs the tests that inject faults and prints Markdown; fails where one was not survived
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
KINDS = ("worker", "node", "driver", "storage", "damage")
TESTS = (
    "tests/pipeline/test_generate.py",
    "tests/stages/generate/test_driver.py",
    "tests/stages/generate/test_faults.py",
    "tests/stages/records/test_folder.py",
    "tests/stages/records/test_repair.py",
    "tests/stages/records/test_verification.py",
    "tests/stages/test_buckets.py",
    "tests/test_soak.py",
)


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
    """One row per fault, those of a kind together."""
    told = [json.loads(line) for line in lines]
    passed = Counter((one["kind"], one["fault"]) for one in told)
    injected = passed + Counter(failed)
    order = {kind: place for place, kind in enumerate(KINDS)}
    rows = sorted(injected, key=lambda row: (order.get(row[0], len(KINDS)), row))
    table = ["| kind | fault | times injected | times survived |", "| --- | --- | --- | --- |"]
    return "\n".join(
        table + [f"| {kind} | {fault} | {injected[kind, fault]} | {passed[kind, fault]} |" for kind, fault in rows]
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines, report = Path(folder) / "lines", Path(folder) / "report.xml"
        lines.touch()
        words = [sys.executable, "-m", "pytest", f"--junitxml={report}", *filter(os.path.exists, TESTS)]
        status = subprocess.run(
            words, env=os.environ | {VARIABLE: str(lines)}, stdout=sys.stderr, check=False
        ).returncode
        print(to_markdown(lines.read_text().splitlines(), failures(report)))
    sys.exit(status)


if __name__ == "__main__":
    main()
