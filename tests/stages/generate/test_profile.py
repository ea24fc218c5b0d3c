from __future__ import annotations

import time

import pytest

from stages.generate import profile
from stages.generate.events import Failed, Loaded, Made
from stages.generate.profile import Clock, Profile


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's time, as a list of one number to set."""
    now = [0.0]
    monkeypatch.setattr(profile.time, "monotonic", lambda: now[0])
    return now


def test_a_clock_adds_up_times_even_after_errors() -> None:
    clock = Clock()
    for _ in range(2):
        with pytest.raises(RuntimeError), clock.spent_on("teacher"):
            time.sleep(0.01)
            raise RuntimeError
    assert clock["teacher"] >= 0.02
    assert clock["writing"] == 0


def test_the_teachers_share_is_of_the_workers_time(clock_time: list[float]) -> None:
    run_profile = Profile()
    run_profile.see(Loaded({}, "one"))
    clock_time[0] = 10
    run_profile.see(Loaded({}, "two"))
    spent = {"teacher": 8.0, "recording": 1.0, "encoding": 2.0, "writing": 3.0}
    run_profile.see(Made(0, 5, "one", spent))
    run_profile.see(Made(1, 5, "one", spent))
    run_profile.see(Made(2, 7, "two", spent))
    clock_time[0] = 20
    summary = run_profile.summary()
    assert summary["profile"] == {
        "teacher": 24.0, "recording": 3.0, "encoding": 6.0, "writing": 9.0,
        "waiting": 20 + 10 - 24 - 3, "teacher_share": 24 / 30,
    }  # fmt: skip
    assert summary["workers"] == {"one": {"units": 2, "records": 10}, "two": {"units": 1, "records": 7}}


def test_a_lost_worker_counts_once_and_its_time_ends_there(clock_time: list[float]) -> None:
    run_profile = Profile()
    run_profile.see(Loaded({}, "one"))
    clock_time[0] = 4
    for unit in (0, 1):  # one sampled, one written
        run_profile.see(Failed(unit, ConnectionError(), preempted=True, worker="one", lost=True))
    run_profile.see(Failed(2, ValueError(), worker="two"))
    clock_time[0] = 100
    summary = run_profile.summary()
    assert (summary["workers_lost"], summary["workers_preempted"], run_profile.present) == (1, 1, 4)


def test_a_run_without_a_worker_has_a_profile_too() -> None:
    assert Profile().summary()["profile"]["teacher_share"] == 0
