"""The card of a dataset: what it says, and that what it shows runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stages.publish.dataset import publish_dataset
from stages.publish.dataset_card import PICTURES, card_of
from stages.records.verification import survey
from stages.storage.folder import open_folder
from tests.conftest import generate
from tests.stages.test_sizes import sized_config
from tests.support.hub import WRITER, Hub

REPO = "datasets/someone/tiny"


@pytest.fixture
def published(hub: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the shared dataset and its card."""
    hub.point_to(monkeypatch, WRITER)
    publish_dataset(shared_dataset, "someone/tiny", license="cc-by-4.0")
    return hub


def test_it_tells_the_teacher_the_licence_and_the_counts(published: Hub) -> None:
    _, header, text = published.repos[REPO].files["README.md"].decode().split("---\n", 2)
    info = yaml.safe_load(header)
    assert info["license"] == "cc-by-4.0"
    assert info["task_categories"] == ["unconditional-image-generation"]
    assert info["configs"] == [{"config_name": "default", "data_files": "shards/*.tar"}]
    assert {"webdataset", "guidance-distillation"} <= set(info["tags"])
    assert "| teacher | tiny_dit, a local folder of its author: its weights are not on the hub |" in text
    assert "| pipeline | DiTPipeline |" in text
    assert (
        "the Python package `adapter-guidance-distillation`, which made the dataset, and the teacher's weights:" in text
    )
    assert "output_dir=runs/adapter pretrained_model_name_or_path=tiny_dit\n" in text
    assert "| licence of the teacher's weights | unknown: the model's card states none |" in text
    assert "| guidance scales | 1 to 6 |\n| classes | 10 |\n| trajectories | 12 |\n| records | 48 |" in text
    assert "| `latent` | float16 | `[4, 8, 8]` |" in text


def test_its_histograms_are_pictures(published: Hub, tmp_path: Path) -> None:
    files = published.repos[REPO].files
    shown = re.findall(r"!\[.*\]\((.*)\)", files["README.md"].decode())
    assert {f"{PICTURES}/{name}.png" for name in ("scale", "class_label", "timestep")} <= set(shown)
    for name in shown:
        (tmp_path / "picture.png").write_bytes(files[name])
        assert Image.open(tmp_path / "picture.png").size == (500, 260)


def test_it_shows_prompts_and_several_sizes(tmp_path: Path) -> None:
    config = sized_config("stable_diffusion", tmp_path)
    with Path(str(config.prompts)).open("a") as file:
        file.write("\na prompt whose turn never comes")
    root = generate(replace(config, num_trajectories=2, num_trajectories_per_condition=1))
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    card = card_of(survey(open_folder(root), deep=True), "someone/sized", None)
    text = card["README.md"].decode()
    assert "text-to-image" in text
    assert "license:" not in text
    assert "| prompts | 2 |\n| trajectories | 2 |" in text
    assert "| licence of the teacher's weights | openrail++ |" in text
    assert f"![histogram of size]({PICTURES}/size.png)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `latent` |")]
    assert row.count("`[") == 2


def test_its_code_reads_each_sample(published: Hub, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", published.repos[REPO].files["README.md"].decode(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            env=os.environ | published.environment() | {"HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 12
        assert all(1 <= float(line.split()[0]) <= 6 for line in lines)
        assert all(line.endswith("] torch.Size([4, 4, 8, 8]) torch.Size([4, 4, 8, 8])") for line in lines)
