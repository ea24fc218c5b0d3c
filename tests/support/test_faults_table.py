from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.faults_table import VARIABLE, failures, survived, to_markdown

REPORT = """<testsuites><testsuite>
  <testcase classname="tests.a" name="passes"/>
  <testcase classname="tests.a" name="fails"><failure message="no"/></testcase>
  <testcase classname="tests.b" name="breaks"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_what_was_survived_is_counted_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "lines"))
    for fault, kind in (("a hang", "worker"), ("a kill", "worker"), ("a kill", "worker"), ("a kill", "driver")):
        survived(fault, kind)
    table = to_markdown((tmp_path / "lines").read_text().splitlines(), [])
    assert "| worker | a hang; a kill (2 times) | 3 | 3 |" in table
    assert "| driver | a kill | 1 | 1 |" in table


def test_what_failed_is_not_survived(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    failed = failures(tmp_path / "report.xml")
    table = to_markdown([json.dumps({"kind": "node", "fault": "a loss"})], failed)
    assert table.splitlines()[-2:] == ["| tests.a | fails | 1 | 0 |", "| tests.b | breaks | 1 | 0 |"]


def test_without_a_table_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    survived("a kill", "worker")
    assert list(tmp_path.iterdir()) == []
