"""`accelerate launch` of the training command, on one machine and on two: the processes share one stream."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.prompted import prompted_dataset

ROOT = Path(__file__).parents[2]
LAUNCH = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0", "-m", "pipeline.train",
]  # fmt: skip
WORDS = [
    "max_train_steps=12", "validation_share=0.2", "checkpointing_steps=8", "logging_steps=4", "report_to=none", "device=cpu",
    "adapter.hidden_size=16", "adapter.rank=4", "lr_warmup_steps=0",
]  # fmt: skip


def train(command: list[str], *overrides: str) -> tuple[str, str]:
    """Return the output and the progress lines."""
    done = subprocess.run(
        [sys.executable, "-m", *command, *WORDS, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.long
def test_two_processes_train_like_one_with_twice_the_batch(shared_dataset: Path, tmp_path: Path) -> None:
    data = f"data_dir={shared_dataset}"
    printed, info = train(LAUNCH, data, f"output_dir={tmp_path / 'two'}", "train_batch_size=4")
    train(["pipeline.train"], data, f"output_dir={tmp_path / 'one'}", "train_batch_size=8")
    two, one = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    summaries = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("two", "one")]
    for key in ("loss", "validation_loss", "validation_loss_unguided"):
        assert abs(summaries[0][key] - summaries[1][key]) < 1e-4 * summaries[1][key]
    assert printed.count("parameters at") == printed.count("12 steps, validation loss") == 1
    assert info.count("train: 12/12 steps") == 1
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 2


class Machines:
    """Two machines, each with one process: two launchers in folders of their own, which share nothing but the data."""

    def __init__(self, root: Path) -> None:
        self.folders = [root / f"machine-{rank}" for rank in range(2)]
        for folder in self.folders:
            folder.mkdir()

    def train(self, *overrides: str) -> list[tuple[int, str]]:
        """Return each machine's exit status and output."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        place = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        place += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        started = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *place),
                    *("--machine_rank", str(rank), "-m", "pipeline.train", *WORDS, *overrides),
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, cwd=folder, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank, folder in enumerate(self.folders)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=240)[0] for process in started]
        return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


@pytest.mark.long
def test_two_machines_train_like_one_process_with_twice_the_batch(shared_dataset: Path, tmp_path: Path) -> None:
    """Only the first machine has the run's folder, also when the run is resumed, finished, or refused."""
    machines, run = Machines(tmp_path), [f"data_dir={shared_dataset}", "output_dir=run", "train_batch_size=4"]
    begun = machines.train(*run, "max_train_steps=8", "lr_scheduler=constant")
    assert [status for status, _ in begun] == [0, 0], begun
    refused = machines.train(*run, "lr_scheduler=constant")
    assert [status for status, _ in refused] == [1, 1]
    assert all("error: run: holds an earlier run" in output for _, output in refused)
    resumed = machines.train(*run, "lr_scheduler=constant", "resume_from_checkpoint=latest")
    assert [status for status, _ in resumed] == [0, 0], resumed
    again = machines.train(*run, "lr_scheduler=constant", "resume_from_checkpoint=latest")
    assert [status for status, _ in again] == [0, 0]
    assert "already trained with this configuration" in again[0][1]
    assert not (machines.folders[1] / "run").exists()

    train(["pipeline.train"], run[0], f"output_dir={tmp_path / 'one'}", "train_batch_size=8", "lr_scheduler=constant")
    two, one = (
        load_file(folder / "adapter_model.safetensors") for folder in (machines.folders[0] / "run", tmp_path / "one")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompted_dataset(tmp_path_factory.mktemp("prompted"))


SPLIT = [*LAUNCH[:1], "--use_fsdp", "--fsdp_version", "2", *LAUNCH[2:]]  # in place of --multi_gpu


@pytest.mark.long
def test_a_base_split_over_two_processes_trains_the_same_adapter(prompted: Path, tmp_path: Path) -> None:
    """With 3 held-out trajectories, which two processes cannot share evenly; it is resumed half way."""
    words = f"data_dir={prompted}", "train_batch_size=4", "validation_share=0.25", "lr_scheduler=constant"
    train(LAUNCH, *words, f"output_dir={tmp_path / 'whole'}")
    train(SPLIT, *words, f"output_dir={tmp_path / 'split'}", "max_train_steps=8")
    resumed, _ = train(SPLIT, *words, f"output_dir={tmp_path / 'split'}", "resume_from_checkpoint=latest")
    assert "continues after step 8 of 12" in resumed
    train(SPLIT, *words, f"output_dir={tmp_path / 'less'}", "gradient_checkpointing=true")
    losses = [
        json.loads((tmp_path / name / "training.json").read_text())["validation_loss"] for name in ("whole", "split")
    ]
    assert abs(losses[1] - losses[0]) < 1e-4 * losses[0]
    whole, split, less = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "split", "less")
    )
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(less[name], whole[name], atol=1e-4, rtol=1e-3)


@pytest.mark.long
def test_a_base_that_cannot_be_split_is_refused_in_one_line(shared_dataset: Path, tmp_path: Path) -> None:
    for launch, message in (
        (SPLIT, "error: --use_fsdp: DiTTransformer2DModel does not name the blocks to split it by: launch without"),
        (
            ["1" if word == "2" and SPLIT[i - 1] == "--fsdp_version" else word for i, word in enumerate(SPLIT)],
            "error: --fsdp_version 1: ",
        ),
    ):
        words = [f"data_dir={shared_dataset}", f"output_dir={tmp_path}", *WORDS]
        done = subprocess.run(
            [sys.executable, "-m", *launch, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert message in done.stderr
