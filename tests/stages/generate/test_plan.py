from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.errors import UserError
from stages.generate.plan import Plan, count_classes
from tests.conftest import generate_config


def plan(teacher: Path, **changes: Any) -> Plan:
    return Plan(generate_config(teacher, Path("nowhere"), **changes))


def test_units_hold_every_trajectory_once(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=11, trajectories_per_unit=4)
    assert len(made) == 3
    assert [t.index for i in range(3) for t in made.unit(i).trajectories] == list(range(11))


def test_trajectories_follow_from_seed_and_index_alone(tiny_teacher: Path) -> None:
    one = plan(tiny_teacher, num_trajectories=30, trajectories_per_unit=7, batch_size=3, num_workers=5)
    other = plan(tiny_teacher, num_trajectories=60, trajectories_per_unit=10)
    assert [one.trajectory(i) for i in range(30)] == [other.trajectory(i) for i in range(30)]
    assert one.trajectory(0) != plan(tiny_teacher, seed=1).trajectory(0)
    assert len({one.trajectory(i).seed for i in range(1000)}) == 1000


def test_scales_are_uniform_in_the_range(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, guidance_scale=[2.0, 6.0])
    scales = np.array([made.trajectory(i).guidance_scale for i in range(2000)])
    counts, _ = np.histogram(scales, bins=4, range=(2, 6))
    assert counts.sum() == 2000
    assert counts.min() > 430


def test_shifts_cover_the_spacing_evenly(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=300)
    shifts = np.sort([made.unit(i).shift for i in range(100)])
    assert np.diff(shifts).max() < 0.03
    assert plan(tiny_teacher, shift_timesteps=False).unit(3).shift == 0


def test_classes_come_from_all_a_list_or_a_file(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3\n1\n")
    assert plan(tiny_teacher).class_labels == list(range(10))
    assert plan(tiny_teacher, class_labels=[4, 2]).class_labels == [4, 2]
    assert plan(tiny_teacher, class_labels=str(tmp_path / "classes.txt")).class_labels == [3, 1]
    assert count_classes(str(tiny_teacher)) == 10


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance_scale": [3.0, 2.0]}, "upside down"),
        ({"guidance_scale": [0.5, 2.0]}, "below 1"),
        ({"guidance_scale": [1.0, float("inf")]}, "endless"),
        ({"guidance_scale": [1.0, float("nan")]}, "upside down"),
        ({"guidance_scale": [2.0]}, "lowest and the highest"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": [10]}, "class 10 is out of range: the teacher knows 0 to 9"),
        ({"class_labels": [-1]}, "out of range"),
        ({"class_labels": ["cat"]}, "'cat' is not a class"),
        ({"class_labels": [1.9]}, "1.9 is not a class"),
        ({"class_labels": [True]}, "True is not a class"),
        ({"class_labels": None}, "class_labels=None: give `all`"),
        ({"class_labels": 5}, "class_labels=5: give `all`"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: at most 1000"),
        ({"storage_dtype": "int8"}, "storage_dtype=int8: one of float32, float16, bfloat16"),
        ({"num_cpus": float("inf")}, "num_cpus=inf: at most 4096"),
        ({"class_labels": "missing.txt"}, "missing.txt: no readable file"),
        ({"num_trajectories": 0}, "num_trajectories=0: at least 1"),
        ({"num_workers": 0}, "num_workers=0: at least 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_no_run_could_carry_out_is_refused_by_name(tiny_teacher: Path, changes: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(tiny_teacher, **changes)


def test_an_empty_class_file_is_named(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").touch()
    with pytest.raises(UserError, match=r"none\.txt: empty"):
        plan(tiny_teacher, class_labels=str(tmp_path / "none.txt"))


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretrained_model_name_or_path=.*missing"):
        plan(tmp_path / "missing")
