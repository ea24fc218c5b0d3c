"""Shared parts of the tests of docker/: the files, and the project's commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from stages.configuration.options import check_bounds
from stages.configuration.parsing import files_and_overrides, parse
from stages.generate.config import GenerateConfig
from stages.train.compatibility import check_together
from stages.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROJECT = "adapter-guidance-distillation"
CONFIGURATIONS = {"pipeline.generate": GenerateConfig, "pipeline.train": TrainConfig}


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def pinned(package: str) -> str:
    """Return the version in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert found, package
    return found[1]


def stages() -> dict[str, str]:
    """Return the instructions of each stage of the Dockerfile, without comments, with continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    parts = re.split(r"^FROM \S+ AS (\w+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def shipped() -> list[str]:
    """Return the files that .dockerignore lets into a build."""
    return [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def commands_in_comments(name: str) -> list[list[str]]:
    """Return the project's commands in a file's comments, in shell quotes or not."""
    comments = re.findall(r"^# +(.*)$", (DOCKER / name).read_text(), re.M)
    found = [re.search(r"python -m pipeline[^']*", comment) for comment in comments]
    return [shlex.split(command[0]) for command in found if command]


def understood(arguments: list[str]) -> GenerateConfig | TrainConfig:
    """Parse a command, up to its end, into its configuration; raise the command's own errors."""
    module = arguments[arguments.index("-m") + 1]
    files, rest = files_and_overrides(arguments[arguments.index("-m") + 2 :])
    config = parse(
        CONFIGURATIONS[module], [*(word for file in files for word in ("--config", str(ROOT / file))), *rest]
    )
    check_bounds(config)
    if isinstance(config, TrainConfig):
        check_together(config)
    return config


def start_options(arguments: list[str]) -> dict[str, Any]:
    """Parse the arguments of `ray start`."""
    from ray.scripts.scripts import start

    return start.make_context("start", list(arguments)).params
