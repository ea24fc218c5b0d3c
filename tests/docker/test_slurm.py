"""slurm.sbatch, run with a fake Slurm that records its arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from stages.generate.config import GenerateConfig
from tests.docker.files import DOCKER, ROOT, start_options, understood

SLURM = {"SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}


def srun_call(tmp_path: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments that the script passes to `srun`, and its environment."""
    stub = tmp_path / "srun"
    stub.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >arguments\nenv -0 >environment\n')
    stub.chmod(0o755)
    env = (
        os.environ | SLURM | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(Path(sys.executable).parents[1])}
    )
    # The activated environment's bin comes first in PATH, and has no srun.
    done = subprocess.run(
        ["bash", DOCKER / "slurm.sbatch", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = (tmp_path / "environment").read_text().split("\0")
    return (tmp_path / "arguments").read_text().split("\0")[:-1], dict(line.split("=", 1) for line in output if line)


def test_every_node_runs_ray_and_the_first_one_the_driver(tmp_path: Path) -> None:
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    config = str(ROOT / "configs/generate/dit_xl_2_256.yaml")
    arguments, environment = srun_call(tmp_path, "--config", config, "output_dir=/shared/two words")
    place = arguments.index("symmetric-run")
    assert arguments[place - 1] == "ray"
    ray, driver = arguments[place + 1 : arguments.index("--")], arguments[arguments.index("--") + 1 :]
    assert re.fullmatch(r"[\d.]+:6379", ray[ray.index("--address") + 1])
    options = start_options(curate_and_validate_ray_start_args(ray))
    assert (options["num_cpus"], options["num_gpus"]) == (32, 4)
    result = understood(driver)
    assert isinstance(result, GenerateConfig)
    assert (result.output_dir, result.num_workers, result.num_gpus) == ("/shared/two words", 12, 1)
    assert result.ray_address == "auto"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch(r"[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])


def test_each_job_has_a_token_of_its_own(tmp_path: Path) -> None:
    assert srun_call(tmp_path)[1]["RAY_AUTH_TOKEN"] != srun_call(tmp_path)[1]["RAY_AUTH_TOKEN"]


def test_the_command_in_its_first_lines_is_valid() -> None:
    (line,) = re.findall(r"^#   sbatch docker/slurm.sbatch (.*)$", (DOCKER / "slurm.sbatch").read_text(), re.M)
    understood(["python", "-m", "pipeline.generate", *line.split()])
