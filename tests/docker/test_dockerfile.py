"""The images, checked without building them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.files import DOCKER, ROOT, pinned, shipped, stages

BIN = Path(sys.executable).parent
TARGETS = ["generate", "train", "test"]


def test_hadolint_accepts_it() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["docker/install.sh", "docker/slurm.sbatch", ".ci/run"])
def test_shellcheck_accepts_it(script: str) -> None:
    done = subprocess.run([BIN / "shellcheck", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_has_the_cuda_that_torch_is_built_for() -> None:
    base = re.search(r"^ARG BASE=nvidia/cuda:(\d+\.\d+)\.\d+-base-\S+$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert base
    assert pinned("nvidia-cuda-runtime").startswith(f"{base[1]}.")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_installs_its_dependencies_and_runs_without_root(target: str) -> None:
    stage = stages()[target]
    assert re.findall(r"install\.sh (\w+) (\w+)", stage) == [("dependencies", target), ("project", target)]
    assert re.findall(r"^USER (.*)$", stage, re.M) == ["1000:1000"]


@pytest.mark.parametrize("target", TARGETS)
def test_files_copied_by_a_target_exist_and_are_not_ignored(target: str) -> None:
    stage = stages()[target]
    sources = re.findall(r"type=bind,source=([^,]+)", stage) + re.findall(r"^COPY (?:--\S+ )*(\S+) ", stage, re.M)
    for source in sources:
        assert (ROOT / source).exists()
        assert source == "." or source.split("/")[0] in shipped()


def test_every_file_of_the_build_context_exists() -> None:
    assert [name for name in shipped() if not (ROOT / name).exists()] == []


def test_secrets_stay_out_of_the_images_and_of_git() -> None:
    assert "docker/secrets.env" in (ROOT / ".dockerignore").read_text().splitlines()
    assert "/docker/secrets.env" in (ROOT / ".gitignore").read_text().splitlines()
