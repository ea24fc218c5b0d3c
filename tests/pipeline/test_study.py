"""A study from its file to its report, on the tiny teacher, by the real commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from pipeline import evaluate
from pipeline.study import Study, StudyConfig
from stages.errors import UserError
from tests.sleepers import as_soon_as_they_sleep, write_sleepers

TINY = ["train_batch_size=8", "max_train_steps=4", "validation_share=0.2", "device=cpu"]


@pytest.fixture
def suite(tiny_teacher: Path, tmp_path: Path) -> Path:
    small = ["num_trajectories=12", "num_inference_steps=4", "trajectories_per_unit=3", "device=cpu"]
    adapter = {"data": "tiny", "words": [*TINY, "adapter.hidden_size=16", "adapter.rank=4"]}
    study = {
        "seeds": [0],
        "datasets": {"tiny": [f"teacher.pretrained_model_name_or_path={tiny_teacher}", *small]},
        "adapters": {"default": adapter | {"seeds": [0, 1]}, "full": adapter},
        "evaluations": {
            "scales": {
                "adapters": ["default", "full"],
                "words": ["guidance_scale=[2]", "num_samples=4", "num_inference_steps=2", "methods=[one_pass,cfg_first_50]", "device=cpu"],
            }
        },
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study))
    return path


def test_a_study_is_made_judged_and_told(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "claims"
    monkeypatch.setattr(sys, "argv", ["evaluate", f"suite={suite}", f"output_dir={output}", "jobs=2"])
    with pytest.raises(SystemExit) as ended:
        evaluate.run(evaluate.StudyConfig, evaluate.study, "")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    told = json.loads((output / "claims.json").read_text())
    assert len(told["claims"]) == 5
    assert "One pass is what two passes are" in printed.out
    rows = [row for row in told["rows"] if row["method"] == "one_pass"]
    assert [(row["name"], row["seed"]) for row in rows] == [("default", 0), ("default", 1), ("full", 0)]
    assert all(row["teacher_evaluations"] == 2 * 48 and row["training_seconds"] > 0 for row in rows)
    tables = (output / "claims.md").read_text()
    assert tables.count("| One pass is what two passes are |") == 1
    assert "| one pass | default |" in tables
    page = (output / "claims.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"adapters": {"default": {"data": "other", "words": []}}},
            "adapters.default.data: other: not among the datasets",
        ),
        ({"evaluations": {"scales": {"adapters": ["x"], "words": []}}}, "evaluations.scales.adapters: x: not among"),
        ({"datasets": {"tiny": "words"}}, "datasets"),
    ],
)
def test_a_file_that_names_what_is_not_there_is_refused(suite: Path, changes: dict, told: str) -> None:
    suite.write_text(json.dumps(json.loads(suite.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        Study(StudyConfig(str(suite)))


def test_what_fails_is_named_with_its_log(suite: Path, tmp_path: Path) -> None:
    study = json.loads(suite.read_text())
    study["datasets"]["tiny"] = ["num_trajectories=many"]
    suite.write_text(json.dumps(study))
    with pytest.raises(
        UserError, match=r"generate tiny: num_trajectories=many.*generate-tiny.log\); the same command again"
    ):
        Study(StudyConfig(str(suite), str(tmp_path / "claims"), jobs=1)).run()


def test_an_interruption_ends_what_runs_and_begins_no_more(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the study's process alone, as by SIGTERM; a terminal interrupts the others too."""
    study = json.loads(suite.read_text())
    study["datasets"]["other"] = study["datasets"]["tiny"]
    suite.write_text(json.dumps(study))
    write_sleepers(tmp_path)
    monkeypatch.chdir(tmp_path)
    as_soon_as_they_sleep(tmp_path, 1, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Study(StudyConfig(str(suite), str(tmp_path / "claims"))).run()
    assert capsys.readouterr().out == "generate tiny: ended by signal 15 after: begun\n"
    assert len(list(tmp_path.glob("*.pid"))) == 1
