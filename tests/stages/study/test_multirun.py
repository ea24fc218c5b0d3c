from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from stages.configuration.parsing import help_text, parse
from stages.errors import UsageError, UserError
from stages.study.multirun import alternatives, combinations, multirun, one_by_one, table, train_over_ray
from stages.train.config import TrainConfig
from tests.support.sleepers import as_soon_as_they_sleep, write_sleepers

ROOT = Path(__file__).parents[3]
PLACES = ["data_dir=data", "output_dir=runs/sweep"]


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("offset,lora", ["offset", "lora"]),
        ("0, 1", ["0", "1"]),
        ("[1,3]", ["[1,3]"]),
        ("[1,3],[2,4]", ["[1,3]", "[2,4]"]),
        ("[[class_label,in,[1,2]]],null", ["[[class_label,in,[1,2]]]", "null"]),
        ("{a: 1, b: 2},3", ["{a: 1, b: 2}", "3"]),
        ("'a,b',\"c,d\"", ["a,b", "c,d"]),
        ("'a,b'", ["a,b"]),
        ("s3://bucket/a,/b", ["s3://bucket/a", "/b"]),
        ("1e-3,-2", ["1e-3", "-2"]),
        ("a", ["a"]),
        ("", [""]),
        ("a,,b", ["a,,b"]),
        ("[1,2", ["[1,2"]),
        ("a],[b", ["a],[b"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(value: str, values: list[str]) -> None:
    assert alternatives(f"key={value}") == [f"key={value}" for value in values]


def test_every_combination_is_a_run_named_by_its_values(tmp_path: Path) -> None:
    config = tmp_path / "seed=0,1.yaml"
    config.write_text("learning_rate: 0.5\nscale_range: [1, 2]\n")
    overrides = ["seed=0,1", "--config", str(config), *PLACES, "scale_range=[1,3],[2.5,4]", "adapter.rank=3"]
    root, runs = combinations(overrides)
    assert root == Path("runs/sweep")
    assert [run.folder.name for run in runs] == [
        "seed=0,scale_range=1,3",
        "seed=0,scale_range=2.5,4",
        "seed=1,scale_range=1,3",
        "seed=1,scale_range=2.5,4",
    ]
    assert runs[3].compared == {"seed": "1", "scale_range": "[2.5,4]"}
    parsed = parse(TrainConfig, runs[3].overrides)
    assert (parsed.seed, parsed.scale_range, parsed.learning_rate, parsed.adapter.rank) == (1, [2.5, 4.0], 0.5, 3)
    assert (parsed.output_dir, parsed.resume_from_checkpoint) == (str(runs[3].folder), "latest")


@pytest.mark.parametrize(
    ("value", "name"),
    [("a/b: c", "a_b_c"), ("../x", ".._x"), ("'a b'", "a_b"), ("é,", "é,")],
)
def test_any_value_makes_a_valid_folder_name(value: str, name: str) -> None:
    quoted = value if value.startswith("'") else f'"{value}"'
    _, runs = combinations([*PLACES, f"pretrained_model_name_or_path={quoted},other"])
    assert runs[0].folder == Path("runs/sweep", f"pretrained_model_name_or_path={name}")
    assert parse(TrainConfig, runs[0].overrides).output_dir == str(runs[0].folder)


@pytest.mark.parametrize(
    ("overrides", "info"),
    [
        ([*PLACES, "seed=0"], "--multirun: no key has several values: give one several"),
        ([*PLACES, "seed=0,1", "seed=2"], "--multirun: no key has several values"),
        ([*PLACES, "seed=0,0"], "seed=0: 2 runs would get this name"),
        (["data_dir=data", "output_dir=a,b"], "output_dir: all runs share one folder"),
        (["data_dir=data", "seed=0,1"], "output_dir: not given"),
        ([*PLACES, "seed=0,one"], "seed=one: must be a whole number"),
        ([*PLACES, "sead=0,1"], "sead: no such key: did you mean seed?"),
        ([*PLACES, "seed=0,1", "--quiet"], "--quiet: not understood"),
        ([*PLACES, "seed=0,1", "--config"], "--config: name a YAML file"),
        ([*PLACES, "seed=0,-1"], "seed=-1: at least 0"),
        ([*PLACES, "adapter.variant=offset,lorra"], "adapter.variant=lorra: one of"),
        ([*PLACES, f"pretrained_model_name_or_path={'a' * 300},b"], "pretrained_model_name_or_path=aaaa"),
    ],
)
def test_an_invalid_combination_starts_nothing(overrides: list[str], info: str) -> None:
    with pytest.raises(UserError) as error:
        multirun(overrides)
    assert str(error.value).startswith(info)
    assert isinstance(error.value, UsageError) or "lorra" in info
    assert not Path("runs/sweep").exists()


def test_the_table_shows_measures_and_errors() -> None:
    measures = {
        "adapter_parameters": 31712,
        "adapter_share": 0.026,
        "validation_loss": 0.5,
        "records_per_second": 1234.5,
    }
    rows = [
        {"overrides": {"adapter.variant": "offset", "seed": "0"}, **measures, "gap_left": 0.25},
        {"overrides": {"adapter.variant": "lora", "seed": "0"}, "error": "seed: wrong"},
    ]
    assert table(rows).splitlines() == [
        "adapter.variant  seed  parameters  share  validation loss  gap left  records/s",
        "         offset     0      31,712  2.60%          0.50000     0.250      1,234",
        "           lora     0           -      -                -         -          -  seed: wrong",
    ]


def test_training_describes_the_flag_and_does_not_import_ray() -> None:
    code = "import sys, pipeline.train as t; print(t.__doc__); sys.exit('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--multirun data_dir=" in help_text(TrainConfig, done.stdout)


SMALL = ["max_train_steps=2", "train_batch_size=8", "validation_share=0.2", "report_to=none", "device=cpu"]


def test_one_dataset_serves_all_runs(shared_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = ["adapter.sites=[attention],[nowhere]"]
    overrides = [f"data_dir={shared_dataset}", f"output_dir={tmp_path}", "adapter.variant=offset", *SMALL, *compared]
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        multirun(overrides)
    first, second = json.loads((tmp_path / "multirun.json").read_text())["rows"]
    assert first["overrides"] == {"adapter.sites": "[attention]"}
    training = json.loads((tmp_path / first["name"] / "training.json").read_text())
    assert first["validation_loss"] == training["validation_loss"]
    assert first["gap_left"] == training["validation_loss"] / training["validation_loss_unguided"]
    assert second["error"].startswith("adapter.sites: ")
    output = capsys.readouterr().out.splitlines()
    assert output[1].startswith("[1/2] adapter.sites=attention: 2 steps, validation loss ")
    assert output[2] == f"[2/2] adapter.sites=nowhere: failed: {second['error']}"
    assert output[-1].endswith(second["error"])
    assert f"{first['adapter_parameters']:,}" in output[-2]
    assert "sites, " in (tmp_path / "adapter.sites=attention.log").read_text()


@pytest.mark.long
def test_over_ray_a_run_is_trained_and_then_left_unchanged(
    shared_dataset: Path, tmp_path: Path, ray_cluster: None
) -> None:
    compared = ["adapter.sites=[attention],[feed_forward]"]
    overrides = [f"data_dir={shared_dataset}", f"output_dir={tmp_path}", "adapter.variant=offset", *SMALL, *compared]
    _, (one, _) = combinations(overrides)
    ((trained, good, line),) = train_over_ray([one], num_cpus=1)
    assert (trained, good) == (one, True)
    assert line.startswith("2 steps, validation loss ")
    (again,) = train_over_ray([one], num_cpus=1)
    assert again == (one, True, "already trained with this configuration; nothing to do")


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which `pipeline.train` sleeps."""
    write_sleepers(tmp_path)
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_killed_run_is_reported_and_stops_no_other(sleeper: Path) -> None:
    _, runs = combinations([*PLACES, "seed=0,1"])
    as_soon_as_they_sleep(sleeper, 1, lambda pid: os.kill(pid, signal.SIGKILL))
    with closing(one_by_one(runs)) as outcomes:
        assert next(outcomes)[1:] == (False, "ended by signal 9 after: begun")
        for path in sleeper.glob("*.pid"):
            path.unlink()
        as_soon_as_they_sleep(sleeper, 1, lambda pid: os.kill(pid, signal.SIGTERM))
        assert next(outcomes)[1:] == (False, "ended by signal 15 after: begun")


def assert_an_interruption_ends_them(how: Callable, at_once: int, sleeper: Path) -> None:
    _, runs = combinations([*PLACES, "seed=0,1"])
    as_soon_as_they_sleep(sleeper, at_once, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        list(how(runs))
    begun = [int(path.stem) for path in sleeper.glob("*.pid")]
    assert len(begun) == at_once
    assert not any(psutil.pid_exists(pid) for pid in begun)


def test_an_interruption_ends_the_processes_of_the_runs(sleeper: Path) -> None:
    assert_an_interruption_ends_them(one_by_one, 1, sleeper)


@pytest.mark.long
def test_an_interruption_ends_the_processes_of_the_runs_over_ray(sleeper: Path, ray_cluster: None) -> None:
    assert_an_interruption_ends_them(lambda runs: train_over_ray(runs, num_cpus=1), 2, sleeper)
