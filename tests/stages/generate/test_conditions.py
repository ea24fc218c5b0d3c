from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from stages.base.prompts import check_columns, read_prompts
from stages.errors import UserError
from stages.generate.conditions import count_classes, read_class_labels, read_conditions
from stages.generate.config import TeacherConfig
from tests.conftest import generate_config
from tests.support.families import save


def test_classes_come_from_all_a_list_or_a_file(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3\n1\n")
    assert read_class_labels("all", 10) == list(range(10))
    assert read_class_labels([4, 2], 10) == [4, 2]
    assert read_class_labels(str(tmp_path / "classes.txt"), 10) == [3, 1]
    assert count_classes(TeacherConfig(str(tiny_teacher))) == 10
    config = generate_config(tiny_teacher, tmp_path, class_labels=[4, 2])
    assert read_conditions(config) == [{"class_label": 4}, {"class_label": 2}]


def test_classes_are_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbf3\r\n1\r\n")
    assert read_class_labels(str(tmp_path / "classes.txt"), 10) == [3, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--5", "'--5' is not a class"),
        ("٣".encode(), "'٣' is not a class"),
        (b"9" * 5000, "is not a class"),
        (b"1.0", "'1.0' is not a class"),
        (b"caf\xe9", "is not a class"),
        ("3\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    ],
)
def test_an_invalid_class_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_class_labels(str(tmp_path / "classes.txt"), 10)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_an_empty_class_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.txt").touch()
    with pytest.raises(UserError, match=r"none\.txt: empty"):
        read_class_labels(str(tmp_path / "none.txt"), 10)


def test_a_missing_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretrained_model_name_or_path=.*missing"):
        count_classes(TeacherConfig(str(tmp_path / "missing")))


def test_a_teacher_of_prompts_requires_them(tmp_path: Path) -> None:
    folder = save("stable_diffusion", tmp_path / "teacher")
    with pytest.raises(UserError, match=r"not class-conditional: give it prompts=FILE"):
        read_conditions(generate_config(folder, tmp_path))


def test_prompts_for_a_teacher_of_classes_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"prompts=.*prompts\.txt: DiTPipeline takes classes, not prompts"):
        read_conditions(generate_config(tiny_teacher, tmp_path, prompts=str(tmp_path / "prompts.txt")))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("StableDiffusionPipeline", "prompt,image\na cat,a.png\n", "StableDiffusionPipeline takes no image: leave the"),
        ("StableDiffusionPipeline", "image\na.png\n", "StableDiffusionPipeline takes no image"),
        ("StableVideoDiffusionPipeline", "prompt,image\na cat,a.png\n", "takes no prompt: leave the column out"),
        ("WanImageToVideoPipeline", "prompt\na cat\n", "WanImageToVideoPipeline needs a column image: give it one"),
        ("StableDiffusionInstructPix2PixPipeline", "image\na.png\n", "needs a column prompt: give it one"),
        (None, "prompt,image\na cat,a.png\na dog,\n", "row 2: has no image, which row 1 has"),
        (None, "prompt,image\na dog,\na cat,a.png\n", "row 1: has no image, which row 2 has"),
        (None, "prompt,image\n,a.png\na cat,a.png\n", "row 1: has no prompt, which row 2 has"),
    ],
)
def test_columns_that_a_pipeline_does_not_take_are_refused(
    tmp_path: Path, kind: str | None, rows: str, message: str
) -> None:
    (tmp_path / "p.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        check_columns(read_prompts(str(tmp_path / "p.csv")), "p.csv", kind and getattr(diffusers, kind))


def test_pictures_alone_are_conditions_of_a_pipeline_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("image,seed\na.png,3\n")
    rows = read_prompts(str(tmp_path / "p.csv"))
    check_columns(rows, "p.csv", diffusers.StableVideoDiffusionPipeline)
    assert rows == [{"image": "a.png", "seed": 3}]


def test_a_negative_prompt_is_given_in_one_place_only(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na cat,grey\n")
    config = generate_config(save("stable_diffusion", tmp_path / "teacher"), tmp_path, prompts=str(tmp_path / "p.csv"))
    assert read_conditions(config) == [{"prompt": "a cat", "negative_prompt": "grey"}]
    config.teacher.call = {"negative_prompt": "blurry"}
    with pytest.raises(UserError, match="teacher.call.negative_prompt: each row .* has its own"):
        read_conditions(config)
