from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from stages.base.prompts import read_prompts
from stages.errors import UserError
from tests.support.faulty_s3 import FaultyS3

ROWS = [
    {"prompt": "a cat", "negative_prompt": "blurry", "seed": 3, "guidance_scale": 2.5, "class_label": 1},
    {"prompt": "a dog, running", "negative_prompt": "", "seed": 4, "guidance_scale": 7.0, "class_label": 2},
]


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog, running \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == [{"prompt": "a cat"}, {"prompt": "a dog, running"}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_further_columns_of_tables_belong_to_their_prompt(tmp_path: Path, suffix: str) -> None:
    path, table = tmp_path / f"prompts.{suffix}", pa.Table.from_pylist([row | {"other": 1} for row in ROWS])
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    elif suffix == "csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    assert read_prompts(str(path)) == ROWS


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e"]
LOOKS_LIKE = ["007", "1e5", "2024-01-01", "true", "null", "NA", "nan", "1.50", "12:30", "#1", "-"]


def written(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def prompts_in(path: str) -> list[str]:
    return [row["prompt"] for row in read_prompts(path)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "un café noir\r\na dog\ra cow\n"),
        ("p.csv", "prompt\r\nun café noir\r\na dog\r\n\r\na cow"),
        ("p.jsonl", '{"prompt": "un café noir"}\n\n{"prompt": "a dog"}\n{"prompt": "a cow"}\n'),
    ],
)
def test_utf_8_is_read_with_or_without_a_byte_order_mark(tmp_path: Path, mark: bytes, name: str, content: str) -> None:
    assert prompts_in(written(tmp_path, name, mark + content.encode())) == ["un café noir", "a dog", "a cow"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_an_end_of_line_ends_a_prompt(tmp_path: Path, separator: str) -> None:
    expected = [f"a cat{separator}on a mat", "a dog"]
    assert prompts_in(written(tmp_path, "p.txt", "\n".join(expected))) == expected
    assert prompts_in(written(tmp_path, "p.csv", "\n".join(["prompt", *expected]))) == expected
    objects = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in expected]
    assert prompts_in(written(tmp_path, "p.jsonl", "\n".join(objects))) == expected


def test_a_text_stays_a_text(tmp_path: Path) -> None:
    assert prompts_in(written(tmp_path, "p.csv", "\n".join(["prompt", *LOOKS_LIKE]))) == LOOKS_LIKE
    assert prompts_in(written(tmp_path, "p.txt", "\n".join(LOOKS_LIKE))) == LOOKS_LIKE
    assert (
        prompts_in(written(tmp_path, "p.jsonl", "\n".join(json.dumps({"prompt": t}) for t in LOOKS_LIKE))) == LOOKS_LIKE
    )
    quoted = written(tmp_path, "q.csv", 'prompt,seed\n"a sign\r\nsays ""stop"", here",3\n\n,,\na dog,\n')
    assert read_prompts(quoted) == [{"prompt": 'a sign\r\nsays "stop", here', "seed": 3}, {"prompt": "a dog"}]


def test_no_other_column_matters(tmp_path: Path) -> None:
    table = b"prompt,note,note\na cat,caf\xe9,\na dog," + b"x" * 200_000 + b",1e999\n"
    assert prompts_in(written(tmp_path, "p.csv", table)) == ["a cat", "a dog"]
    lines = (
        b'{"prompt": "a cat", "note": NaN}\n{"prompt": "a dog", "note": "\xe9", "n": '
        + b"9" * 9999
        + b', "o": {"seed": []}}'
    )
    assert prompts_in(written(tmp_path, "p.jsonl", lines)) == ["a cat", "a dog"]
    columns: dict[str, Any] = {
        "prompt": pa.array(["a cat", "a dog"]).dictionary_encode(),
        "negative_prompt": pa.array(["", "grey"], pa.large_string()),
        "seed": pa.array([1, 2**63 - 1], pa.uint64()),
        "guidance_scale": pa.array([2, None], pa.decimal128(5, 1)),
        "nested": pa.array([{"seed": [1]}, None]),
        "when": pa.array([0, 1], pa.timestamp("ns")),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")) == [
        {"prompt": "a cat", "negative_prompt": "", "seed": 1, "guidance_scale": 2.0},
        {"prompt": "a dog", "negative_prompt": "grey", "seed": 2**63 - 1},
    ]


def test_numbers_are_read_in_the_spellings_of_tables(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "prompt, seed ,guidance_scale,class_label\na cat, 7.0,7.5 ,+3\n")
    assert read_prompts(path) == [{"prompt": "a cat", "seed": 7, "guidance_scale": 7.5, "class_label": 3}]
    pq.write_table(pa.table({"prompt": [b"a cat"], "seed": [7.0], "class_label": ["3"]}), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")) == [{"prompt": "a cat", "seed": 7, "class_label": 3}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "not readable"),
        ("empty.txt", "\n", "empty"),
        ("prompts.doc", "x", "one of .txt, .jsonl, .csv, .parquet"),
        ("broken.jsonl", "{", "not readable: row 1: .*one JSON object per line"),
        ("list.jsonl", '[{"prompt": "a cat"}]', "row 1: not a JSON object"),
        ("deep.jsonl", '{"prompt": ' + "[" * 200_000, "row 1: "),
        ("broken.parquet", "x", "not readable"),
        ("other.csv", "text\na cat\n", "no column `prompt`; its columns are text"),
        ("semicolons.csv", "prompt;seed\na cat;3\n", "separated by semicolons: save it with commas"),
        ("tabs.csv", "seed\tprompt\n3\ta cat\n", "separated by tabs"),
        ("twice.csv", "prompt,prompt\na cat,b\n", "prompt is there twice"),
        ("twice.jsonl", '{"prompt": "a", "prompt": "b"}', "row 1: prompt is there twice"),
        ("cells.csv", "prompt,seed\na cat, running,5\n", "row 1: 3 cells, where the first line names 2 columns"),
        ("open.csv", 'prompt\n"a cat\na dog\n', "a quotation mark is opened and never closed"),
        ("none.jsonl", '{"prompt": "a cat"}\n{"prompt": null, "seed": 3}', "row 2: has no prompt"),
        ("number.jsonl", '{"prompt": 5}', "row 1: prompt=5: not a text"),
        ("list_of_texts.jsonl", '{"prompt": "a", "negative_prompt": ["b"]}', "row 1: negative_prompt=.*: not a text"),
        ("half.jsonl", '{"prompt": "a \\ud83d cat"}', "row 1: prompt=.*: not a text in UTF-8"),
        (
            "latin.csv",
            "prompt\na cat\nun café\n".encode("latin-1"),
            "row 2: prompt=.*not a text in UTF-8: save the file",
        ),
        ("latin.txt", "a cat\nun café\n".encode("latin-1"), "row 2: prompt=.*not a text in UTF-8"),
        ("utf_16.csv", "prompt\na cat\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("utf_16.txt", b"\xfe\xff" + "a cat".encode("utf-16-be"), "it is UTF-16"),
        ("zeros.txt", "a cat".encode("utf-16-le"), "row 1: prompt=.*not a text in UTF-8"),
        ("scale.csv", "prompt,guidance_scale\na cat,0.5\n", "row 1: guidance_scale='0.5': scales below 1"),
        ("nan.csv", "prompt,guidance_scale\na cat,nan\n", "row 1: guidance_scale='nan': not a number"),
        ("nan.jsonl", '{"prompt": "a cat", "guidance_scale": NaN}', "row 1: guidance_scale=nan: give a finite scale"),
        ("endless.jsonl", '{"prompt": "a cat", "guidance_scale": 1e400}', "row 1: guidance_scale=inf: give a finite"),
        ("endless.csv", "prompt,guidance_scale\na cat,1e400\n", "row 1: guidance_scale='1e400': give a finite scale"),
        ("comma.csv", 'prompt,guidance_scale\na cat,"7,5"\n', "row 1: guidance_scale='7,5': not a number"),
        ("true.jsonl", '{"prompt": "a cat", "guidance_scale": true}', "row 1: guidance_scale=True: not a number"),
        ("seed.csv", "prompt,seed\na cat,-5\n", "row 1: seed='-5': give one from 0 to 9223372036854775807"),
        ("half_seed.csv", "prompt,seed\na cat,1.5\n", "row 1: seed='1.5': not a whole number"),
        ("true_seed.jsonl", '{"prompt": "a cat", "seed": true}', "row 1: seed=True: not a number"),
        ("great_seed.csv", f"prompt,seed\na cat,{2**63}\n", f"row 1: seed='{2**63}': give one from 0"),
        ("great_seed.jsonl", f'{{"prompt": "a", "seed": {2**64}}}', f"row 1: seed={2**64}: give one from 0"),
        ("endless_seed.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "row 1: seed=inf: not a whole number"),
        ("rounded_seed.jsonl", '{"prompt": "a", "seed": 9.1e18}', r"row 1: seed=9.1e\+18: not a whole number"),
        ("label.csv", "prompt,class_label\na cat,dog\n", "row 1: class_label='dog': not a number"),
        ("great_label.csv", f"prompt,class_label\na cat,{2**64}\n", "row 1: class_label="),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        written(tmp_path, name, content)
    with pytest.raises(UserError, match=f"{name}.*{message}") as error:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": pa.array([b"a cat", b"caf\xe9"])}, "row 2: prompt=.*not a text in UTF-8"),
        ({"prompt": pa.array([1, 2])}, "row 1: prompt=1: not a text"),
        ({"prompt": pa.array([["a"], ["b"]])}, "row 1: prompt=.*: not a text"),
        ({"prompt": ["a", "b"], "seed": pa.array([1, 2**63], pa.uint64())}, f"row 2: seed={2**63}"),
        ({"prompt": ["a", "b"], "seed": pa.array([1, 2], pa.timestamp("s"))}, "row 1: seed=.*not a number"),
        ({"prompt": ["a", "b"], "guidance_scale": pa.array([None, float("nan")])}, "row 2: guidance_scale=nan"),
        ({"text": ["a", "b"]}, "no column `prompt`; its columns are text"),
    ],
)
def test_invalid_columns_of_a_parquet_file_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"p\.parquet.*{message}"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_duplicate_columns_are_refused_if_they_belong_to_prompts(tmp_path: Path) -> None:
    one, other = pa.array(["a cat"]), pa.array([3])
    pq.write_table(pa.Table.from_arrays([one, other, other], ["prompt", "note", "note"]), tmp_path / "p.parquet")
    assert prompts_in(str(tmp_path / "p.parquet")) == ["a cat"]
    pq.write_table(pa.Table.from_arrays([one, other, other], ["prompt", "seed", "seed"]), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="seed is there twice"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_prompts_are_read_from_a_bucket(s3: FaultyS3) -> None:
    s3.put("coco/train.txt", b"a cat\na dog\n")
    assert read_prompts("s3://bucket/coco/train.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    with pytest.raises(UserError, match=r"prompts=s3://bucket/missing\.txt: not readable"):
        read_prompts("s3://bucket/missing.txt")
