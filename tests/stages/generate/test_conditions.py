from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.generate.conditions import count_classes, read_class_labels, read_conditions
from stages.generate.config import TeacherConfig
from tests.conftest import generate_config
from tests.families import save


def test_classes_come_from_all_a_list_or_a_file(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3\n1\n")
    assert read_class_labels("all", 10) == list(range(10))
    assert read_class_labels([4, 2], 10) == [4, 2]
    assert read_class_labels(str(tmp_path / "classes.txt"), 10) == [3, 1]
    assert count_classes(TeacherConfig(str(tiny_teacher))) == 10
    config = generate_config(tiny_teacher, tmp_path, class_labels=[4, 2])
    assert read_conditions(config) == [{"class_label": 4}, {"class_label": 2}]


def test_an_empty_class_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.txt").touch()
    with pytest.raises(UserError, match=r"none\.txt: empty"):
        read_class_labels(str(tmp_path / "none.txt"), 10)


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretrained_model_name_or_path=.*missing"):
        count_classes(TeacherConfig(str(tmp_path / "missing")))


def test_a_teacher_of_prompts_asks_for_them(tmp_path: Path) -> None:
    folder = save("stable_diffusion", tmp_path / "teacher")
    with pytest.raises(UserError, match=r"not class-conditional: give it prompts=FILE"):
        read_conditions(generate_config(folder, tmp_path))


def test_prompts_for_a_teacher_of_classes_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"prompts=.*prompts\.txt: DiTPipeline takes classes, not prompts"):
        read_conditions(generate_config(tiny_teacher, tmp_path, prompts=str(tmp_path / "prompts.txt")))
