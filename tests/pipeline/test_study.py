"""A study from its file to its report: the real commands, on the tiny teacher."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest

from stages.errors import UsageError, UserError
from stages.storage.locks import exclusive_lock
from stages.study.plan import PlannedRun
from stages.study.study import Study, StudyConfig, cost
from tests.support.sleepers import as_soon_as_they_sleep, write_commands, write_sleepers

CLAIMS = {
    "two_passes": {"judgement": "closes_gap", "threshold": 0.97, "text": "One pass is what two passes are"},
    "images": {"judgement": "frechet_at_each_scale", "threshold": 1.03, "text": "Its images are as good"},
    "best_images": {"judgement": "frechet_at_best_scale", "text": "At its best it is not worse"},
    "partial_guidance": {"judgement": "beats_partial_guidance", "text": "It beats CFG on the first half"},
    "frozen_base": {"judgement": "matches", "threshold": 0.01, "against": ["full"], "text": "A frozen base is enough"},
}
TINY = ["train_batch_size=8", "max_train_steps=4", "validation_share=0.2", "device=cpu"]


@pytest.fixture
def study_file(tiny_teacher: Path, tmp_path: Path) -> Path:
    small = ["num_trajectories=12", "num_inference_steps=4", "trajectories_per_unit=3", "device=cpu"]
    adapter = {"data": "tiny", "overrides": [*TINY, "adapter.hidden_size=16", "adapter.rank=4"]}
    study = {
        "seeds": [0],
        "datasets": {"tiny": [f"teacher.pretrained_model_name_or_path={tiny_teacher}", *small]},
        "adapters": {"default": adapter | {"seeds": [0, 1]}, "full": adapter},
        "evaluations": {
            "scales": {
                "adapters": ["default", "full"],
                "overrides": ["guidance_scale=[2]", "num_samples=4", "num_inference_steps=2", "methods=[one_pass,cfg_first_50]", "device=cpu"],
            }
        },
        "claims": {name: {"evaluation": "scales", "adapters": ["default"]} | claim for name, claim in CLAIMS.items()},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study))
    return path


@pytest.mark.long
def test_a_study_runs_and_its_claims_are_judged_and_reported(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "claims"
    monkeypatch.setattr(sys, "argv", ["study", str(study_file), f"output_dir={output}", "jobs=2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pipeline.study", run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    info = json.loads((output / "claims.json").read_text())
    assert len(info["claims"]) == 5
    assert "One pass is what two passes are" in printed.out
    rows = [row for row in info["rows"] if row["method"] == "one_pass"]
    assert [(row["name"], row["seed"]) for row in rows] == [("default", 0), ("default", 1), ("full", 0)]
    assert all(row["teacher_evaluations"] == 2 * 48 and row["training_seconds"] > 0 for row in rows)
    tables = (output / "claims.md").read_text()
    assert tables.count("| One pass is what two passes are |") == 1
    assert "| one pass | default |" in tables
    page = (output / "claims.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page


@pytest.mark.parametrize(
    "evaluation",
    [
        {"adapters": ["default"], "overrides": ["num_samples=x"]},
        {"adapters": ["x"], "overrides": []},
    ],
)
def test_an_invalid_file_is_named_before_anything_starts(study_file: Path, tmp_path: Path, evaluation: dict) -> None:
    study = json.loads(study_file.read_text()) | {"evaluations": {"scales": evaluation}, "claims": {}}
    study_file.write_text(json.dumps(study))
    with pytest.raises(UsageError, match=f"^{study_file}: evaluat"):
        Study(StudyConfig(str(study_file), str(tmp_path / "claims")))
    assert not (tmp_path / "claims").exists()


def test_a_failure_skips_only_what_depends_on_it(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = json.loads(study_file.read_text())
    study["datasets"] = {"bad": study["datasets"]["tiny"]} | study["datasets"]
    study["adapters"]["bad"] = {"data": "bad", "overrides": TINY}
    study["evaluations"] |= {"data_cost": {"adapters": ["full", "bad"], "overrides": []}}
    study_file.write_text(json.dumps(study))
    write_commands(
        tmp_path, "import sys\nsys.exit(any(word.endswith('data/bad') for word in sys.argv) and 'error: no')"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "claims.json").write_text("of an earlier plan")
    with pytest.raises(UserError, match=r"^generate bad: no \(log: .*generate-bad.log\); fix that and repeat"):
        Study(StudyConfig(str(study_file), "claims", jobs=1)).run()
    assert capsys.readouterr().out.splitlines() == [
        "generate bad: no",
        "generate tiny: ",
        "train default-0: ",
        "train default-1: ",
        "train full-0: ",
        "train bad-0: skipped, because a command that it needs failed",
        "evaluate scales: ",
        "evaluate data_cost: skipped, because a command that it needs failed",
    ]
    assert not (tmp_path / "claims" / "claims.json").exists()


def test_an_adapter_costs_the_trajectories_that_it_was_trained_on(tmp_path: Path) -> None:
    """The dataset grew to 20 trajectories after the training."""
    training = dict.fromkeys(("seconds", "peak_memory_bytes", "adapter_parameters", "adapter_share"), 1)
    for name, content in (
        ("training", training),
        ("adapter_config", {"training": {"trajectories": 12}}),
        ("generation", {"trajectories": 20, "teacher_evaluations": 160}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert cost(PlannedRun("one", 0, tmp_path, tmp_path))["teacher_evaluations"] == 96


def test_a_folder_is_locked_for_one_study_at_a_time(study_file: Path, tmp_path: Path) -> None:
    study = Study(StudyConfig(str(study_file), str(tmp_path / "claims")))
    with (
        exclusive_lock(tmp_path / "claims", "a test goes on"),
        pytest.raises(UserError, match="another study is running"),
    ):
        study.run()


def test_an_interruption_ends_running_commands_and_starts_no_other(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the study's process is interrupted, as by SIGTERM; a terminal would interrupt the whole group."""
    study = json.loads(study_file.read_text())
    study["datasets"]["other"] = study["datasets"]["tiny"]
    study_file.write_text(json.dumps(study))
    write_sleepers(tmp_path)
    monkeypatch.chdir(tmp_path)
    as_soon_as_they_sleep(tmp_path, 1, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Study(StudyConfig(str(study_file), str(tmp_path / "claims"))).run()
    assert capsys.readouterr().out == "generate tiny: ended by signal 15 after: begun\n"
    assert len(list(tmp_path.glob("*.pid"))) == 1
