"""`accelerate launch` of the training command: the processes share one stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
