from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages.configuration.parsing import parse
from stages.errors import UsageError
from stages.evaluate.config import EvaluateConfig, SampleConfig
from stages.generate.config import GenerateConfig
from stages.study.plan import override
from stages.train.config import TrainConfig

TEXTS = [
    "20240101_1200",
    "007",
    "1e3",
    "12:30",
    "yes",
    "no",
    "1.50",
    "exp #2",
    "a: b",
    "{a}",
    "'x'",
    '"x"',
    "0x1f",
    "-1",
]
TEXTS += [
    "1_000",
    ".5",
    "2024-01-01",
    "[draft",
    "=",
    "a=b",
    "!x",
    "%x",
    "@x",
    "&x",
    "*x",
    "?",
    "- a",
    "null,",
    "on",
    "café",
]


def train(*overrides: str) -> TrainConfig:
    return parse(TrainConfig, ["data_dir=d", "output_dir=o", *overrides])


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    assert train(f"output_dir={text}").output_dir == text
    assert train(f"cache_dir={text}").cache_dir == text
    assert parse(EvaluateConfig, [f"adapter_dir={text}"]).adapter_dir == text
    assert parse(GenerateConfig, ["output_dir=o", override("teacher.pretrained_model_name_or_path", text)]).teacher == (
        parse(GenerateConfig, ["output_dir=o", f"teacher.pretrained_model_name_or_path={text}"]).teacher
    )


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("1_000",)])
def test_so_is_one_in_a_file(text: str, tmp_path: Path) -> None:
    plain = text not in ("exp #2", "a: b", "{a}", "'x'", '"x"', "[draft", "!x", "%x", "@x", "&x", "*x", "?", "- a")
    shown = text if plain else f'"{text}"' if '"' not in text else f"'{text}'"
    (tmp_path / "train.yaml").write_text(
        f"cache_dir: {shown}\nadapter:\n  sites: [{shown if text != 'null,' else 'x'}]\n"
    )
    config = train("--config", str(tmp_path / "train.yaml"))
    assert config.cache_dir == text
    assert config.adapter.sites == [text if text != "null," else "x"]


def test_null_leaves_out_what_may_be_left_out() -> None:
    assert train("cache_dir=x", "cache_dir=null").cache_dir is None
    assert train("cache_dir=x", "cache_dir=").cache_dir is None
    assert train("output_dir=null").output_dir == "null"
    assert train("adapter.sites=[x]", "adapter.sites=null").adapter.sites is None
    with pytest.raises(UsageError, match="output_dir=: empty: say output_dir="):
        train("output_dir=")


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("[no]", ["no"]),
        ("[a sign: stop]", ["a sign: stop"]),
        ("[007, 1e3 , 12:30,null]", ["007", "1e3", "12:30", "null"]),
        ("[exp #2,a cat's hat]", ["exp #2", "a cat's hat"]),
        ("""["a cat, running",'it''s here',"a \\"b\\""]""", ["a cat, running", "it's here", 'a "b"']),
        ('["a" cat, b]', ['"a" cat', "b"]),
        ("[a [b] c]", ["a [b] c"]),
        ("[]", []),
        ("[a,]", ["a"]),
    ],
)
def test_a_list_of_texts_is_parted_at_its_commas(override: str, texts: list[str]) -> None:
    assert parse(SampleConfig, ["adapter_dir=x", f"prompts={override}"]).prompts == texts
    assert train(f"adapter.sites={override}").adapter.sites == texts
    if texts:
        assert parse(EvaluateConfig, [f"adapter_dir={override}"]).adapter_dir == texts


def test_a_list_with_nothing_between_commas_is_refused() -> None:
    with pytest.raises(UsageError, match=r"prompts=\[a,,b\]: nothing between two commas"):
        parse(SampleConfig, ["adapter_dir=x", "prompts=[a,,b]"])
    with pytest.raises(UsageError, match=r"prompts=a: a list is asked for: say prompts=\[a\]"):
        parse(SampleConfig, ["adapter_dir=x", "prompts=a"])


def test_numbers_are_decimal() -> None:
    assert train("max_train_steps=007").max_train_steps == 7
    assert train("max_train_steps=1_000").max_train_steps == 1000
    assert train("learning_rate=1e-4").learning_rate == 1e-4
    assert train("scale_range=[1,2e1]").scale_range == [1.0, 20.0]
    with pytest.raises(UsageError, match=r"max_train_steps=12:30: "):
        train("max_train_steps=12:30")


def test_what_belongs_to_the_user_is_yaml() -> None:
    overrides = ["output_dir=o", "teacher.pretrained_model_name_or_path=x"]
    config = parse(
        GenerateConfig,
        [*overrides, "teacher.call.max_sequence_length=32", "teacher.call.original_size=[64,64]", "teacher.call.flag=false",
         'teacher.call.negative_prompt="no"', "runtime_env.env_vars.NAME=007", "class_labels=[0,7]", "resources.gpu=1"],
    )  # fmt: skip
    info = {"max_sequence_length": 32, "original_size": [64, 64], "flag": False, "negative_prompt": "no"}
    assert config.teacher.call == info
    assert config.runtime_env == {"env_vars": {"NAME": "007"}}
    assert config.class_labels == [0, 7]
    assert config.resources == {"gpu": 1.0}
    assert parse(GenerateConfig, [*overrides, "class_labels=007"]).class_labels == "007"


def test_a_home_folder_is_what_a_shell_means_by_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.yaml").write_text("cache_dir: ~/cache\nmax_train_steps: 7\n")
    config = train("--config", "~/train.yaml", "output_dir=~/run", "pretrained_model_name_or_path=a~b")
    assert (config.output_dir, config.cache_dir) == (f"{tmp_path}/run", f"{tmp_path}/cache")
    assert (config.pretrained_model_name_or_path, config.max_train_steps) == ("a~b", 7)
    assert train("data_dir=~").data_dir == str(tmp_path)
    assert train("data_dir=s3://bucket/~/a#b").data_dir == "s3://bucket/~/a#b"


def test_a_key_that_is_there_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(UsageError, match=r"twice\.yaml: not readable as YAML: seed is there twice"):
        train("--config", str(tmp_path / "twice.yaml"))


def test_texts_deep_in_a_file_are_texts(tmp_path: Path) -> None:
    @dataclass
    class Deep:
        overrides: dict[str, list[str]]
        anything: Any = None

    (tmp_path / "deep.yaml").write_text("words: {a: [007, no, 'x'], 1e3: []}\nanything: [007, no, 1e3]\n")
    config = parse(Deep, ["--config", str(tmp_path / "deep.yaml")])
    assert config.overrides["a"] == ["007", "no", "x"]
    assert config.anything == [7, False, 1000.0]
