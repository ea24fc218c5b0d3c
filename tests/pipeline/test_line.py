"""The whole command line as a user runs it: real commands, real Ray, an embedded teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def command(name: str, *overrides: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which generate, verify, train and evaluate ran once."""
    root = tmp_path_factory.mktemp("line")
    generate = ["--config", "configs/generate/mnist_dit.yaml", f"output_dir={root}/data", "num_trajectories=100"]
    command("generate", *generate)
    assert "already finished" in command("generate", *generate).stdout
    command("verify", f"data_dir={root}/data")
    train = ["--config", "configs/train/lora.yaml", f"data_dir={root}/data", f"output_dir={root}/adapter"]
    command("train", *train, "max_train_steps=60")
    assert "already trained" in command("train", *train, "max_train_steps=60").stdout
    command("evaluate", f"adapter_dir={root}/adapter", "guidance_scale=[2]", "num_samples=20", "num_inference_steps=5")
    return root


@pytest.mark.long
def test_each_command_leaves_its_summary_and_its_configuration(folder: Path) -> None:
    generation = json.loads((folder / "data" / "generation.json").read_text())
    assert (generation["trajectories"], generation["records"], generation["units_committed"]) == (100, 2000, 2)
    verification = json.loads((folder / "data" / "verification.json").read_text())
    assert (verification["ok"], verification["records"]) == (True, 2000)
    training = json.loads((folder / "adapter" / "training.json").read_text())
    assert training["validation_loss"] < training["validation_loss_unguided"]
    evaluation = json.loads((folder / "adapter" / "evaluation" / "evaluation.json").read_text())
    assert [row["method"] for row in evaluation["rows"]] == ["none", "cfg", "one_pass", "cfg_first_50", "cfg_first_60"]
    for place in ("data", "adapter", "adapter/evaluation"):
        assert (folder / place / "config.yaml").exists()
    assert (folder / "adapter" / "evaluation" / "report.html").stat().st_size > 10_000
    assert list((folder / "adapter" / "logs").iterdir())


@pytest.mark.long
def test_images_are_sampled_in_a_grid(folder: Path) -> None:
    output = folder / "grid.png"
    overrides = ["class_labels=[0,1,2]", "guidance_scale=2", "num_inference_steps=5", f"output={output}"]
    printed = command("sample", f"adapter_dir={folder}/adapter", *overrides).stdout
    assert "guided, two passes: 10 denoiser evaluations" in printed
    assert "one pass: 5 denoiser evaluations per image, fused into the base's weights\n" in printed
    with Image.open(output) as image:
        assert image.size == (3 * 64, 3 * 64)


@pytest.mark.long
def test_damage_ends_verify_and_train_with_one_line(folder: Path) -> None:
    shard = next((folder / "data" / "shards").iterdir())
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-1024])
        verify = command("verify", f"data_dir={folder}/data", status=1)
        train = command("train", f"data_dir={folder}/data", f"output_dir={folder}/other", status=1)
    finally:
        shard.write_bytes(whole)
    assert verify.stderr.splitlines()[-1].startswith("error: ")
    assert shard.name in verify.stdout
    assert train.stderr.splitlines()[-1].startswith(f"error: {shard}: damaged")
    assert not (folder / "other").exists()


def test_wrong_usage_ends_with_status_two_and_one_line() -> None:
    printed = command("train", "data_dir=x", "output_dir=y", "learning_rat=3", status=2)
    assert printed.stderr.strip() == "error: learning_rat: no such key: did you mean learning_rate?"
    assert "usage: [--config FILE] key=value" in command("evaluate", "--help").stdout
