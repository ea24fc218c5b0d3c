from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.errors import UserError
from stages.prompts import read_prompts
from tests.faulty_s3 import FaultyS3

ROWS = [
    {"prompt": "a cat", "negative_prompt": "blurry", "seed": 3, "guidance_scale": 2.5, "class_label": 1},
    {"prompt": "a dog, running", "negative_prompt": "", "seed": 4, "guidance_scale": 7.0, "class_label": 2},
]


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog, running \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == [{"prompt": "a cat"}, {"prompt": "a dog, running"}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables_bring_along_what_belongs_to_a_prompt(tmp_path: Path, suffix: str) -> None:
    path, table = tmp_path / f"prompts.{suffix}", pa.Table.from_pylist([row | {"other": 1} for row in ROWS])
    if suffix == "jsonl":
        import json

        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    elif suffix == "csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    assert read_prompts(str(path)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.txt", None, "not readable"),
        ("empty.txt", "\n", "empty"),
        ("prompts.doc", "x", "one of .txt, .jsonl, .csv, .parquet"),
        ("broken.jsonl", "{", "not readable"),
        ("broken.parquet", "x", "not readable"),
        ("other.csv", "text\na cat\n", "row 1: has no prompt"),
        ("scale.csv", "prompt,guidance_scale\na cat,0.5\n", "row 1: guidance_scale=0.5"),
        ("seed.csv", "prompt,seed\na cat,-5\n", "row 1: seed=-5"),
        ("label.csv", "prompt,class_label\na cat,dog\n", "row 1: "),
    ],
)
def test_what_holds_no_prompts_is_named(tmp_path: Path, name: str, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{told}") as error:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_prompts_are_read_from_a_bucket(s3: FaultyS3) -> None:
    s3.put("coco/train.txt", b"a cat\na dog\n")
    assert read_prompts("s3://bucket/coco/train.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    with pytest.raises(UserError, match=r"prompts=s3://bucket/missing\.txt: not readable"):
        read_prompts("s3://bucket/missing.txt")
