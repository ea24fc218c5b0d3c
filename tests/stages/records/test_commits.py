from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.records.commits import commit_unit, read_commits
from stages.records.shard import encode
from stages.storage.folder import open_folder
from tests.stages.records.test_trajectory import trajectory
from tests.support.made_up import PLAN


def test_the_first_attempt_wins_and_the_loser_removes_its_shard(tmp_path: Path) -> None:
    first = commit_unit(open_folder(tmp_path), 3, [encode(trajectory())], PLAN)
    second = commit_unit(open_folder(tmp_path), 3, [encode(trajectory())], PLAN)
    assert second == first
    assert [f"shards/{path.name}" for path in (tmp_path / "shards").iterdir()] == [first.shard]
    assert list(read_commits(open_folder(tmp_path))) == [first]


def test_an_unreadable_commit_is_named(damaged: Path) -> None:
    (damaged / "commits" / "00001.json").write_text("{")
    with pytest.raises(UserError, match=r"00001\.json: damaged"):
        list(read_commits(open_folder(damaged)))


def test_units_of_six_digits_come_after_those_of_five(tmp_path: Path) -> None:
    root = open_folder(tmp_path)
    for unit in (100_000, 99_999, 10_000, 10_001):
        commit_unit(root, unit, [encode(trajectory())], PLAN)
    assert [commit.unit for commit in read_commits(root)] == [10_000, 10_001, 99_999, 100_000]
