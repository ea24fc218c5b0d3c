from __future__ import annotations

import errno
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING

from pipeline.command import run
from stages.configuration.options import to_yaml
from stages.configuration.parsing import help_text, parse
from stages.errors import UsageError, UserError
from stages.generate.config import GenerateConfig
from stages.train.config import TrainConfig


@dataclass
class Inner:
    depth: int = field(default=2, metadata={"help": "how deep"})


@dataclass
class Example:
    name: str = field(default=MISSING, metadata={"help": "what it is called"})
    inner: Inner = field(default_factory=Inner)
    scales: list[float] = field(default_factory=lambda: [1.0, 2.0], metadata={"help": "which scales"})
    anything: Any = field(default=None, metadata={"help": "any value"})
    path: str | None = field(default=None, metadata={"help": "where"})


def test_overrides_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text("name: file\ninner:\n  depth: 3\nscales: [4]\n")
    config = parse(Example, ["--config", str(file), "inner.depth=5", "anything=[1,a]"])
    assert config == Example("file", Inner(5), [4.0], [1, "a"], None)
    assert parse(Example, ["name=word", "--config", str(file)]).name == "word"
    assert parse(Example, ["name=x", "path=null"]).path is None


def test_no_is_a_string_for_a_string_option(tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text("name: no\npath: no\nanything: no\n")
    assert parse(TrainConfig, ["data_dir=d", "output_dir=o", "mixed_precision=no"]).mixed_precision == "no"
    config = parse(Example, ["--config", str(tmp_path / "example.yaml")])
    assert (config.name, config.path, config.anything) == ("no", "no", False)


def test_the_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = Example("x", Inner(7), [3.0], {"a": 1}, "somewhere")
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert parse(Example, ["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=x", "inner.dept=3"], "inner.dept: no such key: did you mean inner.depth?"),
        (["name=x", "zzz=3"], "zzz: no such key: --help lists the keys"),
        (["name=x", "inner.depth=deep"], "inner.depth=deep: must be a whole number"),
        (["name=x", "scales=[a]"], r"scales=\[a\]: must be a number"),
        (["name=x", "scales=3"], r"scales=3: must be a list: say scales=\[3]"),
        (["name=x", "scales=3x4"], r"scales=3x4: must be a list: say scales=\[3,4]"),
        (["name=x", "inner=3"], "inner: contains other keys: say inner.NAME="),
        (["name=${foo}"], r"name=\$\{foo}: Interpolation key 'foo' not found"),
        (["name=${name}"], r"name=\$\{name}: Recursive interpolation"),
        (["name=???"], "name: not given"),
        (["name=x", "name.first=3"], "name={.*Cannot convert"),
        ([], "name: not given: say name=..."),
        (["name"], "name: not understood"),
        (["--name=x"], "--name=x: not understood"),
        (["name=x", "--config"], "--config: name a YAML file"),
        (["--config", "missing.yaml"], "--config missing.yaml: No such file"),
        (["name=x", "scales=[1"], r"scales=\[1: not readable"),
        (["name="], "name=: empty: say name="),
    ],
)
def test_wrong_usage_is_a_one_line_error_that_names_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(Example, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["a: [", "- a\n", "\x00"])
def test_an_invalid_configuration_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"bad\.yaml: ") as error:
        parse(Example, ["--config", str(tmp_path / "bad.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [Example, GenerateConfig, TrainConfig])
def test_help_lists_every_key_with_its_default_and_meaning(config: type) -> None:
    text = help_text(config, "what it does")
    for line in text.splitlines():
        if line.startswith("  ") and not line.startswith("      "):
            assert "default" in line or "required" in line
    if config is Example:
        assert "  name  (str, required)\n      what it is called" in text
        assert "  inner.depth  (int, default 2)\n      how deep" in text


@pytest.mark.parametrize(
    ("raised", "status", "info"),
    [
        (None, 0, ""),
        (UserError("thing: way out"), 1, "error: thing: way out\n"),
        (UsageError("key: way out"), 2, "error: key: way out\n"),
        (KeyboardInterrupt(), 1, "error: interrupted"),
        (ModuleNotFoundError(name="ray"), 1, "error: ray is not installed: pip install '.[generate]'"),
        (OSError(errno.ENOSPC, "No space left on device", "logs"), 1, "error: logs: No space left on device\n"),
    ],
)
def test_exit_status_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException | None,
    status: int,
    info: str,
) -> None:
    def main(config: Example) -> None:
        if raised:
            raise raised

    monkeypatch.setattr(sys, "argv", ["command", "name=x"])
    with pytest.raises(SystemExit) as exited:
        run(Example, main, "")
    assert exited.value.code == status
    assert capsys.readouterr().err.startswith(info)


def test_the_first_argument_may_be_an_option_without_its_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for override in ("x", "name=x"):
        monkeypatch.setattr(sys, "argv", ["command", override])
        with pytest.raises(SystemExit):
            run(Example, lambda config: print(config.name), "", argument="name")
        assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize("path", ["a=b/study.yaml", "./a=b.yaml", "a=b.yaml"])
def test_the_first_argument_may_be_a_path_that_contains_an_equals_sign(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if not path.startswith("."):  # it could be an option, but for the file of that name
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    for word in (path, f"name={path}"):
        monkeypatch.setattr(sys, "argv", ["command", word])
        with pytest.raises(SystemExit):
            run(Example, lambda config: print(config.name), "", argument="name")
        assert capsys.readouterr().out == f"{path}\n"


@pytest.mark.parametrize(
    ("modes", "usage"),
    [
        ({}, "usage: [--config FILE] key=value ..."),
        ({"dry_run": print}, "usage: [--dry-run] [--config FILE] key=value ..."),
        ({"dry_run": print, "multirun": print}, "usage: [--dry-run | --multirun] [--config FILE] key=value ..."),
    ],
)
def test_help_tells_the_ways_to_run_a_command(
    modes: dict[str, Any], usage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        run(Example, print, "what it does", **modes)
    assert usage in capsys.readouterr().out.splitlines()


def test_another_missing_module_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: Example) -> None:
        raise ModuleNotFoundError(name="stages.nowhere")

    monkeypatch.setattr(sys, "argv", ["command", "name=x"])
    with pytest.raises(ModuleNotFoundError):
        run(Example, main, "")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "name=x"])
    with pytest.raises(ZeroDivisionError):
        run(Example, lambda _: 1 / 0, "")  # type: ignore[arg-type, return-value]
