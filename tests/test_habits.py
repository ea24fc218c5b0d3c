"""What a contributor runs beside the tests: make, the hooks of pre-commit, the workflow of GitHub."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MAKEFILE = (ROOT / "Makefile").read_text()
PRE_COMMIT = ROOT / ".pre-commit-config.yaml"
WORKFLOW = ROOT / ".github" / "workflows" / "test.yaml"


def recipe(target: str) -> list[str]:
    """The commands of a target, as a shell reads them."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert found, target
    return [line.strip().replace("$(VENV)", ".venv") for line in found[1].splitlines()]


def targets() -> set[str]:
    found = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert found
    return set(found[1].split())


def test_the_hooks_are_the_commands_of_make_check() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", PRE_COMMIT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    (local,) = yaml.safe_load(PRE_COMMIT.read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == recipe("check")
    for hook in local["hooks"]:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_the_workflow_runs_make_test_on_every_python_from_the_oldest_on() -> None:
    words = [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    oldest = re.search(r'^requires-python = ">=(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert oldest
    assert job["strategy"]["matrix"]["python"] == [oldest[1], "3.11", "3.12", "3.13"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make python=${{ matrix.python }} test"]
    assert "test" in targets()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed here")
def test_make_alone_lists_every_target_with_a_line() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert {target for _, target, _ in lines} == targets()
    assert all(told for _, _, told in lines)


def test_types_are_shipped() -> None:
    """`tests/docker/test_install.py` looks for them where the project is installed."""
    for package in ("pipeline", "stages"):
        assert (ROOT / package / "py.typed").exists()
