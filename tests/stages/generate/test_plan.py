from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.errors import UserError
from stages.generate.plan import Plan
from stages.records.schema import PlanEntry
from tests.conftest import generate_config
from tests.support.families import save
from tests.support.made_up import planned


def plan(teacher: Path, **changes: Any) -> Plan:
    return Plan(generate_config(teacher, Path("nowhere"), **changes))


def test_units_hold_every_trajectory_once(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=11, trajectories_per_unit=4)
    assert len(made) == 3
    assert [t.index for i in range(3) for t in made.unit(i).trajectories] == list(range(11))


def test_trajectories_depend_on_seed_and_index_alone(tiny_teacher: Path) -> None:
    one = plan(tiny_teacher, num_trajectories=30, trajectories_per_unit=7, batch_size=3, num_workers=5)
    other = plan(tiny_teacher, num_trajectories=1000, trajectories_per_unit=10)
    assert [one.trajectory(i) for i in range(30)] == [other.trajectory(i) for i in range(30)]
    assert one.trajectory(0) != plan(tiny_teacher, seed=1).trajectory(0)
    assert len({other.trajectory(i).seed for i in range(1000)}) == 1000


def test_scales_are_uniform_in_the_range(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=2000, guidance_scale=[2.0, 6.0])
    scales = np.array([made.trajectory(i).guidance_scale for i in range(2000)])
    counts, _ = np.histogram(scales, bins=4, range=(2, 6))
    assert counts.sum() == 2000
    assert counts.min() > 430


def test_shifts_cover_the_spacing_evenly(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=300)
    shifts = np.sort([made.unit(i).shift for i in range(100)])
    assert np.diff(shifts).max() < 0.03
    assert plan(tiny_teacher, shift_timesteps=False).unit(3).shift == 0


def test_log_uniform_scales_give_each_doubling_the_same_share(tiny_teacher: Path) -> None:
    scales = {"guidance_scale": [1.0, 16.0], "guidance_scale_distribution": "log_uniform"}
    made = plan(tiny_teacher, num_trajectories=2000, **scales)
    scales = np.array([made.trajectory(i).guidance_scale for i in range(2000)])
    counts, _ = np.histogram(scales, bins=[1, 2, 4, 8, 16])
    assert counts.min() > 430


def test_scales_of_a_list_are_all_drawn(tiny_teacher: Path) -> None:
    scales = {"guidance_scale": [1.0, 3.0, 7.5], "guidance_scale_distribution": "list"}
    made = plan(tiny_teacher, num_trajectories=100, **scales)
    assert {made.trajectory(i).guidance_scale for i in range(100)} == {1.0, 3.0, 7.5}
    assert made.scale_range == [1.0, 7.5]


def test_every_condition_has_its_trajectories(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=None, num_trajectories_per_condition=3, class_labels=[4, 2])
    assert made.num_trajectories == 6
    assert [made.trajectory(i).condition["class_label"] for i in range(6)] == [4, 2] * 3


def test_a_prompts_own_values_take_precedence_over_drawn_ones(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a cat", "seed": 5, "guidance_scale": 9.5}\n{"prompt": "a dog", "negative_prompt": "blue"}\n'
    )
    teacher = save("stable_diffusion", tmp_path / "teacher")
    made = plan(teacher, prompts=str(tmp_path / "prompts.jsonl"), num_trajectories=4)
    cat, dog, cat_again, _ = (made.trajectory(i) for i in range(4))
    assert (cat.seed, cat.guidance_scale, cat.condition) == (5, 9.5, {"prompt": "a cat", "negative_prompt": ""})
    assert cat_again.seed != 5
    assert cat_again.guidance_scale == 9.5
    assert dog.condition == {"prompt": "a dog", "negative_prompt": "blue"}
    assert made.scale_range == [1.0, 9.5]


def test_random_steps_are_drawn_for_each_trajectory(tiny_teacher: Path) -> None:
    made = plan(tiny_teacher, num_trajectories=400, num_inference_steps=50, num_recorded_steps=5)
    steps = [made.trajectory(i).steps for i in range(400)]
    assert all(s == sorted(set(s)) and len(s) == 5 for s in steps if s is not None)
    assert {step for s in steps if s is not None for step in s} == set(range(50))
    assert made.records_per_trajectory == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": [3.0, 2.0]}, "upside down"),
        ({"guidance_scale": [0.5, 2.0]}, "below 1"),
        ({"guidance_scale": [1.0, float("inf")]}, "endless"),
        ({"guidance_scale": [1.0, float("nan")]}, "below 1"),
        ({"guidance_scale": [], "guidance_scale_distribution": "list"}, "name the scales"),
        ({"guidance_scale_distribution": "normal"}, "one of uniform, log_uniform, list"),
        ({"num_trajectories_per_condition": 2}, "give one of them"),
        ({"num_recorded_steps": 5}, "num_recorded_steps=5: at most num_inference_steps=4"),
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
        ({"trajectory": "forward"}, "trajectory=forward: one of guided, diffusion"),
        ({"storage_dtype": "int8"}, "storage_dtype=int8: one of float32, float16, bfloat16"),
        ({"num_cpus": float("inf")}, "num_cpus=inf: at most 4096"),
        ({"class_labels": "missing.txt"}, "missing.txt: no readable file"),
        ({"num_trajectories": 0}, "num_trajectories=0: at least 1"),
        ({"num_workers": 0}, "num_workers=0: at least 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_an_impossible_plan_is_refused_by_the_options_name(tiny_teacher: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(tiny_teacher, **changes)


def as_made(made: Plan, *earlier: PlanEntry) -> PlanEntry:
    """Return the entry of `dataset.json` for a plan that follows earlier ones."""
    trajectories = made.num_trajectories - sum(plan.trajectories for plan in earlier)
    return planned(trajectories=trajectories, conditions=len(made.conditions))


def labels(made: Plan) -> list[int]:
    return [made.trajectory(i).condition["class_label"] for i in range(made.num_trajectories)]


def test_more_trajectories_follow_the_existing_ones_in_new_units(tiny_teacher: Path) -> None:
    old = plan(tiny_teacher, num_trajectories=11, trajectories_per_unit=4)
    new = Plan(
        generate_config(tiny_teacher, Path("nowhere"), num_trajectories=17, trajectories_per_unit=4), [as_made(old)]
    )
    assert [list(new.trajectories_of(unit)) for unit in range(len(new))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
        [11, 12, 13, 14],
        [15, 16],
    ]
    assert [new.unit(i) for i in range(3)] == [old.unit(i) for i in range(3)]
    at_once = plan(tiny_teacher, num_trajectories=17)
    assert [new.trajectory(i) for i in range(17)] == [at_once.trajectory(i) for i in range(17)]


def test_trajectories_of_new_conditions_follow_the_existing_ones(tiny_teacher: Path) -> None:
    each = {"num_trajectories": None, "num_trajectories_per_condition": 2}
    old = plan(tiny_teacher, class_labels=[4, 2], **each)
    asked = [
        ({"class_labels": [4, 2, 7, 1], **each}, [7, 1, 7, 1]),
        ({"class_labels": [4, 2], **each, "num_trajectories_per_condition": 4}, [4, 2, 4, 2]),
        ({"class_labels": [4, 2, 7], **each, "num_trajectories_per_condition": 3}, [7, 7, 4, 2, 7]),
        ({"class_labels": [4, 2, 7], "num_trajectories": 6}, [7, 7]),
        ({"class_labels": [4, 2, 7], "num_trajectories": 4}, []),
    ]
    for changes, expected in asked:
        new = Plan(generate_config(tiny_teacher, Path("nowhere"), **changes), [as_made(old)])
        assert labels(new) == [4, 2, 4, 2, *expected], changes
        assert [new.trajectory(i) for i in range(4)] == [old.trajectory(i) for i in range(4)]
        assert len({new.trajectory(i).seed for i in range(new.num_trajectories)}) == new.num_trajectories


def test_a_plan_grows_more_than_once(tiny_teacher: Path) -> None:
    earlier: list[PlanEntry] = []
    for count, classes in ((3, [5, 6]), (5, [5, 6]), (9, [5, 6, 7, 8]), (12, [5, 6, 7, 8])):
        config = generate_config(tiny_teacher, Path("nowhere"), num_trajectories=count, class_labels=classes)
        made = Plan(config, earlier)
        earlier.append(as_made(made, *earlier))
    assert labels(made) == [5, 6, 5, 6, 5, 7, 8, 7, 8, 6, 7, 8]
    assert [list(made.trajectories_of(unit)) for unit in range(len(made))] == [
        [0, 1, 2],
        [3, 4],
        [5, 6, 7],
        [8],
        [9, 10, 11],
    ]
    assert Plan(config, earlier).bounds.tolist() == made.bounds.tolist()


def test_a_prompts_own_seed_is_used_once_in_any_growth(tmp_path: Path) -> None:
    teacher = save("stable_diffusion", tmp_path / "teacher")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat", "seed": 5}\n')
    config = generate_config(teacher, tmp_path, prompts=str(tmp_path / "prompts.jsonl"), num_trajectories=2)
    old = Plan(config)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat", "seed": 5}\n{"prompt": "a dog", "seed": 6}\n')
    new = Plan(replace(config, num_trajectories=5), [as_made(old)])
    assert [new.trajectory(i).condition["prompt"] for i in range(5)] == ["a cat", "a cat", "a dog", "a dog", "a cat"]
    assert [new.trajectory(i).seed for i in (0, 2)] == [5, 6]
    assert len({new.trajectory(i).seed for i in range(5)}) == 5
