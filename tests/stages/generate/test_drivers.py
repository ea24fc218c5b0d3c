"""Several drivers on one folder, interleaved poll by poll: none mixes its units with another's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.errors import DamageError, UserError
from stages.generate.config import GenerateConfig
from stages.generate.driver import Driver
from stages.generate.events import Event, Failed
from stages.generate.in_process import InProcessFleet
from stages.records.commits import commit_unit, committed_units
from stages.records.dataset import Dataset
from stages.records.plans import snapshots
from stages.records.repair import repair
from stages.records.verification import survey, verify
from stages.storage.folder import open_folder
from tests.conftest import generate, generate_config
from tests.stages.generate.test_driver import Faulty, assert_same_records
from tests.stages.records.test_repair import samples_of
from tests.support.faults_table import survived

pytestmark = pytest.mark.usefixtures("layout_found_once")


class Interrupted(InProcessFleet):
    """Calls a function before one of its polls: the first poll loads the teacher, each other makes a unit."""

    def __init__(self, config: GenerateConfig, poll: int, interrupt: Callable[[], Any]) -> None:
        super().__init__(config)
        self.polls_left, self.interrupt = poll, interrupt

    def poll(self, timeout: float) -> list[Event]:
        if self.polls_left == 0:
            self.interrupt()
        self.polls_left -= 1
        return super().poll(timeout)


@pytest.mark.parametrize("poll", [0, 1])
def test_of_two_configurations_one_is_refused_before_it_commits(
    tiny_teacher: Path, tmp_path: Path, shared_dataset: Path, poll: int
) -> None:
    """The other driver starts while the teacher is loaded, or while the first unit is sampled, and makes everything."""
    config, other = (generate_config(tiny_teacher, tmp_path / "data", seed=seed) for seed in (1, 0))
    with pytest.raises(UserError, match="another configuration: seed=0, not 1"):
        Driver(config).run(Interrupted(config, poll, lambda: generate(other)))
    assert verify(tmp_path / "data")["ok"]
    assert_same_records(tmp_path / "data", shared_dataset)
    survived("two drivers with different configurations: one refused", "driver")


def test_a_commit_of_another_plan_is_never_published(tiny_teacher: Path, tmp_path: Path, shared_dataset: Path) -> None:
    """A worker commits just after another driver wrote another dataset.json."""
    config = generate_config(tiny_teacher, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Driver(config).run(Faulty(config, {}, die_after=1))
    unit = Driver(config).todo[0]
    other = generate_config(tiny_teacher, tmp_path, seed=1)
    foreign = commit_unit(open_folder(tmp_path), unit, samples_of(other, unit), "0" * 64)
    with pytest.raises(
        DamageError, match=f"commits/0000{unit}.json: damaged: expected a unit of the plan in dataset.json"
    ):
        Driver(config).run(InProcessFleet(config))
    assert f"commits/0000{unit}.json" in {problem["shard"] for problem in verify(tmp_path)["problems"]}
    done = repair(survey(open_folder(tmp_path), deep=True), grace=0)
    assert [each["shard"] for each in done] == [f"commits/0000{unit}.json", foreign.shard]
    Driver(config).run(InProcessFleet(config))
    assert verify(tmp_path)["ok"]
    assert_same_records(tmp_path, shared_dataset)
    survived("a commit of another plan", "dataset")


def test_growth_to_another_size_waits_for_a_plan_under_way(damaged: Path, tiny_teacher: Path) -> None:
    one, other = (generate_config(tiny_teacher, damaged, num_trajectories=count) for count in (18, 20))
    late = Driver(other)

    def begin() -> None:
        with pytest.raises(KeyboardInterrupt):
            Driver(one).run(Faulty(one, {}, die_after=1))

    with pytest.raises(UserError, match="num_trajectories=18, not 20: finish that first"):
        late.run(Interrupted(other, 0, begin))
    generate(one)
    generate(other)
    assert (len(Dataset(damaged).manifest), len(snapshots(open_folder(damaged)))) == (20, 3)
    survived("two drivers that grow a dataset to different sizes: one refused", "driver")


def test_growth_planned_over_an_older_snapshot_is_refused(damaged: Path, tiny_teacher: Path) -> None:
    one, other = (generate_config(tiny_teacher, damaged, num_trajectories=count) for count in (15, 20))
    with pytest.raises(UserError, match="has grown since this run began: give the command again"):
        Driver(other).run(Interrupted(other, 0, lambda: generate(one)))
    grown = Dataset(damaged).fingerprint
    generate(other)
    assert len(Dataset(damaged, snapshot=grown).manifest) == 15
    assert verify(damaged)["trajectories"] == 20


@pytest.mark.parametrize("poll", [0, 1, 3])
def test_a_dataset_that_another_driver_made_and_grew_is_accepted(tiny_teacher: Path, tmp_path: Path, poll: int) -> None:
    config, larger = (generate_config(tiny_teacher, tmp_path, num_trajectories=count) for count in (12, 15))
    assert Driver(config).run(Interrupted(config, poll, lambda: generate(config)))["units_missing"] == []
    assert Driver(config).finished
    generate(larger)
    assert verify(tmp_path)["ok"]
    assert len(committed_units(open_folder(tmp_path))) == 5


def test_a_dataset_that_grew_before_its_publication_is_left_unchanged(damaged: Path, tiny_teacher: Path) -> None:
    one, other = (generate_config(tiny_teacher, damaged, num_trajectories=count) for count in (15, 20))

    def grow() -> None:
        generate(one)
        generate(other)

    class Last(InProcessFleet):
        def close(self) -> None:
            grow()

    driver = Driver(one)
    driver.run(Last(one))
    assert driver.info is not None
    assert [plan.trajectories for plan in driver.info.plans] == [12, 3, 5]
    assert verify(damaged)["trajectories"] == 20


def test_a_file_of_classes_that_changes_during_a_run_does_not_affect_it_and_is_named_afterwards(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "classes").write_text("0 1 2")
    config = generate_config(tiny_teacher, tmp_path / "data", class_labels=str(tmp_path / "classes"))
    driver = Driver(config)
    (tmp_path / "classes").write_text("7 8 9")
    driver.run(InProcessFleet(config))
    assert Dataset(tmp_path / "data").manifest["class_label"].to_pylist() == [0, 1, 2] * 4
    assert verify(tmp_path / "data")["ok"]
    with pytest.raises(UserError, match="classes no longer names first the 3 that it was made of"):
        Driver(config)
    survived("a file of classes that changes during a run", "driver")


@pytest.mark.parametrize(
    ("requested", "made", "message"),
    [
        ({"num_trajectories": 18}, {"num_trajectories": 16}, "has grown since this run began"),
        ({"class_labels": [0, 1, 3]}, {"class_labels": [0, 1]}, "has grown since this run began"),
    ],
)
def test_as_many_units_of_another_plan_do_not_count_as_made(
    tiny_teacher: Path, tmp_path: Path, requested: dict[str, Any], made: dict[str, Any], message: str
) -> None:
    one, other = (generate_config(tiny_teacher, tmp_path, **changes) for changes in (requested, made))
    with pytest.raises(UserError, match=message):
        Driver(one).run(Interrupted(one, 0, lambda: generate(other)))
    summary = json.loads((tmp_path / "generation.json").read_text())
    assert summary["trajectories"] == other.num_trajectories  # the other driver's, not the refused one's


def test_more_classes_without_more_trajectories_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    generate(generate_config(tiny_teacher, tmp_path, class_labels=[0, 1]))
    with pytest.raises(UserError, match="more prompts or classes than it holds, for no more trajectories"):
        Driver(generate_config(tiny_teacher, tmp_path, class_labels=[0, 1, 3]))


def test_a_restored_description_from_before_growth_is_updated(damaged: Path, tiny_teacher: Path) -> None:
    config = generate_config(tiny_teacher, damaged, num_trajectories=15)
    before = {name: (damaged / name).read_bytes() for name in ("dataset.json", "manifest.parquet")}
    generate(config)
    for name, content in before.items():
        (damaged / name).write_bytes(content)
    assert not Driver(config).finished
    generate(config)
    assert Driver(config).finished
    assert (verify(damaged)["ok"], verify(damaged)["trajectories"]) == (True, 15)


def test_a_repair_keeps_what_was_published_after_its_survey(damaged: Path, tiny_teacher: Path) -> None:
    (damaged / "manifest.parquet").write_bytes(b"")
    found = survey(open_folder(damaged), deep=True)
    generate(generate_config(tiny_teacher, damaged, num_trajectories=15))
    assert repair(found, grace=0) == []
    assert verify(damaged)["trajectories"] == 15
    assert verify(damaged)["ok"]


def test_a_teacher_is_identified_by_its_weights_not_by_its_path(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = generate_config(tiny_teacher, tmp_path / "data")
    monkeypatch.chdir(tiny_teacher.parent)
    relative = generate_config(Path(tiny_teacher.name), tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        Driver(relative).run(Faulty(relative, {}, die_after=1))
    assert Driver(absolute).run(Interrupted(absolute, 1, lambda: generate(relative)))["units_missing"] == []
    assert verify(tmp_path / "data")["ok"]


def test_an_equal_driver_in_its_last_unit_accepts_growth(tiny_teacher: Path, tmp_path: Path) -> None:
    one, larger = (generate_config(tiny_teacher, tmp_path, num_trajectories=count) for count in (12, 15))

    def make_and_grow() -> None:
        generate(one)
        generate(larger)

    assert Driver(one).run(Interrupted(one, 1, make_and_grow))["units_missing"] == []
    assert verify(tmp_path)["trajectories"] == 15


def test_a_worker_that_does_not_load_ends_no_run_in_which_another_loads(tiny_teacher: Path, tmp_path: Path) -> None:
    class Beside(InProcessFleet):
        def poll(self, timeout: float) -> list[Event]:
            return [*super().poll(timeout), Failed(None, RuntimeError("no driver"), worker="other", lost=True)]

    config = generate_config(tiny_teacher, tmp_path)
    assert Driver(config).run(Beside(config))["units_missing"] == []
