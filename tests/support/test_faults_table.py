from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.faults_table import KINDS, RESULT, VARIABLE, count, failures, survived, to_markdown

TESTS = Path(__file__).parents[1]
REPORT = """<testsuites><testsuite>
  <testcase classname="tests.a" name="passes"/>
  <testcase classname="tests.a" name="fails"><failure message="no"/></testcase>
  <testcase classname="tests.b" name="breaks"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_survived_faults_are_counted_by_kind_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "lines"))
    for fault, kind in (("a hang", "worker"), ("a kill", "worker"), ("a kill", "worker"), ("a kill", "driver")):
        survived(fault, kind)
    faults = count((tmp_path / "lines").read_text().splitlines(), [])
    assert to_markdown(faults).splitlines() == [
        "4 faults injected, 4 survived.",
        "",
        "| happens to | fault | injected | survived |",
        "| --- | --- | --- | --- |",
        "| worker | a hang | 1 | 1 |",
        "| worker | a kill | 2 | 2 |",
        "| driver | a kill | 1 | 1 |",
    ]


def test_a_failed_test_counts_as_not_survived(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    failed = failures(tmp_path / "report.xml")
    table = to_markdown(count([json.dumps({"kind": "node", "fault": "a loss"})], failed))
    assert table.startswith("3 faults injected, 1 survived.")
    assert table.splitlines()[-2:] == ["| tests.a | fails | 1 | 0 |", "| tests.b | breaks | 1 | 0 |"]


def test_nothing_is_written_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    survived("a kill", "worker")
    assert list(tmp_path.iterdir()) == []


def test_the_committed_result_names_the_faults_of_the_tests() -> None:
    """If this fails after a fault was added or renamed, run `python -m tests.support.faults_table run`."""
    faults = json.loads(RESULT.read_text())
    assert {fault["kind"] for fault in faults} == set(KINDS)
    assert all(fault["injected"] == fault["survived"] > 0 for fault in faults)
    sources = [path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    named = {pair for source in sources for pair in re.findall(r'[ (]survived\("([^"]+)", "(\w+)"\)', source)}
    assert len(named) > 30
    assert named <= {(fault["fault"], fault["kind"]) for fault in faults}
