"""An image's RUN lines, run in a clean virtual environment: the same script with the same files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.files import ROOT, pinned, shipped, stages


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that .dockerignore lets into a build."""
    folder = tmp_path_factory.mktemp("context")
    for name in shipped():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def mounted(context: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that the dependencies are installed from."""
    folder = tmp_path_factory.mktemp("mounted")
    for source in re.findall(r"type=bind,source=([^,]+)", stages()["train"]):
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(context / source, folder / source)
    return folder


@pytest.fixture(scope="module")
def python(context: Path, mounted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the packages of the image `train`; making it takes about a minute."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    for step, files in (("dependencies", mounted), ("project", context)):
        run(["docker/install.sh", step, "train", python, "--no-compile"], files)
    return python


def run(arguments: list[str | Path], cwd: Path, timeout: float = 600) -> str:
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(Path.home())}
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # the source of wheels
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=clean | kept, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_training_runs_with_the_packages_of_its_image(
    python: Path, context: Path, shared_dataset: Path, tmp_path: Path
) -> None:
    assert "max_train_steps" in run([python, "-m", "pipeline.train", "--help"], tmp_path)
    config = context / "configs" / "train" / "offset.yaml"
    options = [
        f"data_dir={shared_dataset}",
        "output_dir=run",
        "max_train_steps=2",
        "validation_share=0.2",
        "device=cpu",
    ]
    run([python, "-m", "pipeline.train", "--config", config, *options], tmp_path)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 2


@pytest.mark.long
def test_embedded_files_and_evaluation_are_installed_and_ray_is_not(python: Path, tmp_path: Path) -> None:
    script = """
import importlib.util, pathlib, pipeline.evaluate, stages.embedded, stages.evaluate.evaluation, stages.evaluate.report
assert importlib.util.find_spec("ray") is None
embedded = pathlib.Path(stages.embedded.__file__).parent
assert "site-packages" in str(embedded), embedded
assert all(pathlib.Path(package.__file__).with_name("py.typed").exists() for package in (pipeline, stages))
print(*sorted(str(path.relative_to(embedded)) for path in embedded.rglob("*") if path.suffix != ".pyc" and path.is_file()))
"""
    installed = set(run([python, "-c", script], tmp_path).split())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT / "stages" / "embedded", capture_output=True, text=True)
    assert installed >= set(tracked.stdout.split())


@pytest.mark.long
def test_generation_can_be_installed_under_the_constraints(python: Path, mounted: Path, tmp_path: Path) -> None:
    """Resolved only, not installed."""
    report = tmp_path / "report.json"
    run(["docker/install.sh", "dependencies", "generate", python, "--dry-run", "--report", report], mounted)
    found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    versions = {metadata["name"].lower(): metadata["version"] for metadata in found}
    assert versions["ray"] == pinned("ray")
    assert versions["boto3"] == pinned("boto3")


def test_a_wrong_target_is_named() -> None:
    done = subprocess.run([ROOT / "docker/install.sh", "all", "everything"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr
