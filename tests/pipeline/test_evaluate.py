"""Evaluation as a user runs it: killed and run again, in several processes, and on a real Ray."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.evaluate import evaluate, main
from stages.errors import UserError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Evaluation
from stages.evaluate.fleet import EvaluationFleet, evaluate_over_ray
from stages.evaluate.processes import WorkerProcess, evaluate_over_cores, evaluate_over_processes
from tests.stages.evaluate.test_evaluation import without_times

ROOT = Path(__file__).parents[2]
TEN_PARTS = {"num_samples": 20, "batch_size": 2, "num_inference_steps": 3, "guidance_scale": [3.0], "device": "cpu"}


def config(adapter: Path, output: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(adapter_dir=str(adapter), output_dir=str(output), **(TEN_PARTS | changes))


@pytest.fixture(scope="module")
def undisturbed(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(config(tiny_adapter, tmp_path_factory.mktemp("evaluation")))


def parts_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.safetensors")}


def test_everything_is_written(undisturbed: Evaluation) -> None:
    folder = undisturbed.folder
    info = json.loads((folder / "evaluation.json").read_text())
    assert info["rows"] == undisturbed.rows
    assert [row["method"] for row in info["rows"]] == ["none", "cfg", "one_pass", "cfg_first_50", "cfg_first_60"]
    assert (info["variant"], info["num_samples"]) == ("lora", 20)
    assert len(parts_in(folder)) == 10
    assert (folder / "report.html").exists()
    assert not (folder / "images").exists()


def test_the_options_that_differ_are_named(undisturbed: Evaluation, tiny_adapter: Path) -> None:
    with pytest.raises(UserError, match=r"holds another evaluation, .* \(its guidance_scale is \[3.0\], seed is 0\)$"):
        evaluate(config(tiny_adapter, undisturbed.folder, guidance_scale=[2.0], seed=1))


def test_a_killed_evaluation_resumes_and_equals_an_undisturbed_one(
    undisturbed: Evaluation, tiny_adapter: Path, tmp_path: Path
) -> None:
    overrides = [f"{key}={value}" for key, value in TEN_PARTS.items()]
    command = [sys.executable, "-m", "pipeline.evaluate", f"adapter_dir={tiny_adapter}", f"output_dir={tmp_path}"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, stdout=output, stderr=output)
    while len(parts_in(tmp_path)) < 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts_in(tmp_path)
    assert 2 <= len(before) < 10
    assert not (tmp_path / "evaluation.json").exists()
    resumed = evaluate(config(tiny_adapter, tmp_path))
    assert before.items() <= parts_in(tmp_path).items()
    assert without_times(resumed.rows) == without_times(undisturbed.rows)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use Torch's default on two cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_processes_give_the_results_of_one_process(
    undisturbed: Evaluation, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    start = WorkerProcess.__init__
    monkeypatch.setattr(
        WorkerProcess, "__init__", lambda *args, warns: (started.append(warns), start(*args, warns=warns))[1]
    )
    expected = without_times(undisturbed.run())  # again, because a metric's last digits depend on the threads
    run = Evaluation(config(tiny_adapter, tmp_path))
    assert without_times(run.run(evaluate_over_cores)) == expected
    assert started == [True, False]
    assert not multiprocessing.active_children()
    for path in sorted((tmp_path / "parts").iterdir())[:2]:
        path.unlink()
    assert without_times(Evaluation(config(tiny_adapter, tmp_path)).run(evaluate_over_cores)) == expected
    assert len(started) == 2  # this process makes few parts
    assert torch.get_num_threads() == 2


@pytest.mark.long
def test_a_killed_process_is_a_one_line_error(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = WorkerProcess.result
    monkeypatch.setattr(
        WorkerProcess, "result", lambda child: (child.process.kill(), child.process.join(), result(child))[2]
    )
    run = Evaluation(config(tiny_adapter, tmp_path))
    with pytest.raises(UserError, match="a worker process ended with status -9: repeat the command"):
        run.run(lambda _, begin: evaluate_over_processes(run, begin(run.new_worker().load()), 2))
    assert not multiprocessing.active_children()


def test_a_users_error_in_a_process_is_raised(tiny_adapter: Path, tmp_path: Path) -> None:
    run = Evaluation(config(tiny_adapter, tmp_path, lora="somewhere"))
    with pytest.raises(UserError, match="lora=somewhere: DiTPipeline takes no LoRA"):
        list(evaluate_over_processes(run, [0, 1], 2))
    assert not multiprocessing.active_children()


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_worker_processes_end_with_the_evaluation(how: signal.Signals, tiny_adapter: Path, tmp_path: Path) -> None:
    overrides = [f"{key}={value}" for key, value in (TEN_PARTS | {"num_samples": 2000}).items()]
    command = [sys.executable, "-m", "pipeline.evaluate", f"adapter_dir={tiny_adapter}", f"output_dir={tmp_path}"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        process = subprocess.Popen(
            [*command, *overrides], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    while len(parts_in(tmp_path)) < 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    if how == signal.SIGINT:  # to the whole group, as a terminal sends it
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.wait()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    if how != signal.SIGKILL:
        errors = [line for line in log.read_text().splitlines() if not line.startswith("evaluate: ")]
        assert errors == ["error: interrupted; what was written before is kept"]


def test_the_command_adds_the_results_to_the_model_card_and_says_so(
    tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "tiny")
    main(EvaluateConfig(adapter_dir=[str(folder)], **TEN_PARTS))
    expected = f"model card: {folder}/README.md and adapter_config.json beside it now hold these results"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    metadata = json.loads((folder / "adapter_config.json").read_text())
    assert "error_by_timestep" not in json.dumps(metadata)
    assert "| one_pass | 3 |" in (folder / "README.md").read_text()
    assert (folder / "evaluation" / "evaluation.json").exists()


def test_the_model_card_is_unchanged_if_the_pipeline_is_not_the_trained_one(
    tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "tiny")
    main(EvaluateConfig(adapter_dir=str(folder), scheduler="DPMSolverMultistepScheduler", **TEN_PARTS))
    assert (folder / "evaluation" / "evaluation.json").exists()
    assert "| one_pass |" not in (folder / "README.md").read_text()
    assert "model card" not in capsys.readouterr().out


def test_the_library_leaves_the_adapters_folder_unchanged(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    evaluate(EvaluateConfig(adapter_dir=str(folder), **TEN_PARTS))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_parallel_workers_give_the_results_of_one_process(
    undisturbed: Evaluation, tiny_adapter: Path, tmp_path: Path
) -> None:
    shared = Evaluation(config(tiny_adapter, tmp_path))
    rows = shared.run(functools.partial(evaluate_over_ray, num_workers=2, num_cpus=1))
    assert without_times(rows) == without_times(undisturbed.rows)
    names = sorted(parts_in(tmp_path))
    Evaluation(config(tiny_adapter, tmp_path)).run()
    assert sorted(parts_in(tmp_path)) == names


class KillsAWorker(EvaluationFleet):
    """Kills all worker processes as soon as one has a part to make."""

    killed = 0

    def _in_flight(self) -> bool:
        if super()._in_flight() and not self.killed:
            commands = {
                process: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
            }
            workers = [process for process, command in commands.items() if command.startswith("ray::Worker")]
            assert workers
            for worker in workers:
                worker.kill()
            self.killed += 1
        return super()._in_flight()


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced_and_loses_nothing(
    undisturbed: Evaluation, tiny_adapter: Path, tmp_path: Path
) -> None:
    run = Evaluation(
        config(tiny_adapter, tmp_path, batch_size=20)
    )  # one part: the condition is checked while it is made
    fleet = KillsAWorker(run, {"num_cpus": 1})
    rows = run.run(lambda _, begin: fleet.run(begin, 1))
    assert fleet.killed == 1
    assert len(parts_in(tmp_path)) == 1
    for key in ("denoiser_evaluations", "guidance_scale", "class_accuracy"):
        assert [row[key] for row in rows] == [row[key] for row in undisturbed.rows]


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_users_error_in_a_worker_is_raised(tiny_adapter: Path, tmp_path: Path) -> None:
    wrong = Evaluation(config(tiny_adapter, tmp_path, lora="somewhere"))
    with pytest.raises(UserError, match="lora=somewhere: DiTPipeline takes no LoRA"):
        wrong.run(functools.partial(evaluate_over_ray, num_workers=1, num_cpus=1))
