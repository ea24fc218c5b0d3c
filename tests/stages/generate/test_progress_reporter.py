from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.generate.events import WAITING, Event, Failed, Loaded, Made
from stages.generate.plan import Plan
from stages.generate.progress_reporter import QUIET_SECONDS, ProgressReporter, summary_of
from tests.conftest import generate_config

EVENTS: list[Event] = [
    Loaded({}, "teacher-1"),
    Made(2, 12, "teacher-1", {"teacher": 1.5, "writing": 0.5}),
    Failed(3, MemoryError("too much\nof it"), worker="teacher-1"),
    Failed(1, ConnectionError(), preempted=True, worker="teacher-2", lost=True),
    Failed(None, ImportError("no driver"), worker="teacher-3", lost=True),
    Failed(None, UserError("the command ends with it"), worker="teacher-3", lost=True),
]
STATES = Counter({"sampling": 1, "loading": 2, "idle": 0})


def report(teacher: Path) -> None:
    """Report the events of four units, one of them made earlier."""
    reporter = ProgressReporter(Plan(generate_config(teacher, "nowhere")), (1, 12))
    for event in EVENTS:
        reporter.see(event, STATES)
        reporter.tick(STATES)
    reporter.close()


def test_a_log_has_a_line_for_each_unit(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tiny_teacher)
    loaded, made, *failed = capsys.readouterr().err.splitlines()
    assert loaded == "teacher-1: loaded"
    assert made.startswith("unit 00002: 12 records in 2.0 s by teacher-1; 2 of 4 units, ")
    assert made.endswith(" left; 1 sampling, 2 loading")
    assert failed == [
        "unit 00003: failed at teacher-1: MemoryError: too much",
        "unit 00001: failed at teacher-2: its node went away",
        "loading: failed at teacher-3: ImportError: no driver",
    ]


def test_a_terminal_shows_one_bar_and_the_failures(
    tiny_teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report(tiny_teacher)
    shown = capsys.readouterr().err
    assert "24/48" in shown
    assert "2 of 4 units, 1 sampling, 2 loading" in shown
    assert "unit 00002" not in shown
    assert "unit 00003: failed at teacher-1: MemoryError: too much" in shown


def test_states_without_a_worker_are_left_out() -> None:
    assert summary_of(Counter({"sampling": 3, "loading": 0})) == "3 sampling"


def test_a_wait_for_missing_resources_is_reported(
    tiny_teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = generate_config(tiny_teacher, "nowhere", num_gpus=0.5, resources={"fast": 1})
    reporter, states = ProgressReporter(Plan(config), (0, 0)), Counter({WAITING: 2})
    reporter.tick(states)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(reporter, "last", time.monotonic() - QUIET_SECONDS)
    reporter.tick(states)
    reporter.tick(states)
    message = "the cluster has no room yet for num_cpus=1 num_gpus=0.5 resources.fast=1"
    assert capsys.readouterr().err == f"0 of 4 units; 2 waiting for a place: {message}\n"
    monkeypatch.setattr(reporter, "last", time.monotonic() - QUIET_SECONDS)
    reporter.tick(Counter({"sampling": 2}))
    assert capsys.readouterr().err == "0 of 4 units; 2 sampling\n"
