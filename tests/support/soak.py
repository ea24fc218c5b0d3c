"""SIGKILL at random moments to the workers of a generation run, its driver, or both, and a check of the dataset.

python -m tests.support.soak 120 [FOLDER]

Runs the real command on a real Ray on this machine, with a tiny teacher and many small units. It starts the command
again after each kill, and asks for more trajectories whenever all are made. The kills end after the given seconds,
counted from the first worker's start. Then it verifies every hash, and compares the records with those of an
undisturbed run. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from stages.configuration.options import to_yaml
from stages.generate.config import GenerateConfig
from stages.records.dataset import Dataset
from stages.records.verification import verify
from tests.conftest import generate, generate_config, save_pipeline, tiny_dit
from tests.stages.generate.test_driver import assert_same_records

WORKER, DRIVER, BOTH = "worker", "driver", "both"
SECONDS_BETWEEN = 2.0  # mean time between kills
TRAJECTORIES_AT_ONCE = 400  # added each time, in units of two
MOST_SECONDS = 240.0  # limit for the undisturbed rest of the run


def start_command(config: GenerateConfig, log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m pipeline.generate` in a process group of its own; append its output to a file."""
    file = log.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "pipeline.generate", "--config", str(file)]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def kill_command(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a command's process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(reached: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached"
        time.sleep(0.05)


def worker_processes() -> list[psutil.Process]:
    """Return the workers of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "ray::TeacherWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def soak(config: GenerateConfig, folder: Path, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Inject kills for this many seconds, then let the command finish; return the number of kills of each kind.

    At the end `config` holds the number of trajectories that were made.
    """
    chance, log = random.Random(seed), folder / "log"
    kills, commands = Counter({WORKER: 0, DRIVER: 0, BOTH: 0}), 1
    process = start_command(config, log)
    try:
        until(lambda: worker_processes() != [])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (status := process.poll()) is not None:
                config.num_trajectories += 0 if status else TRAJECTORIES_AT_ONCE
                process, commands = start_command(config, log), commands + 1
            time.sleep(chance.expovariate(1 / SECONDS_BETWEEN))
            if workers := worker_processes():
                target = chance.choices((WORKER, DRIVER, BOTH), (3, 1, 1))[0]
                if target != DRIVER:
                    chance.choice(workers).kill()
                if target != WORKER:
                    kill_command(process)
                kills[target] += 1
        while process.wait(MOST_SECONDS):
            process, commands = start_command(config, log), commands + 1
    finally:
        kill_command(process)
    return {"kills": dict(kills), "commands": commands}


def check(dataset: Path, undisturbed: Path) -> None:
    """Check that the dataset is whole, without duplicates, and equal to an undisturbed one."""
    assert verify(dataset)["ok"]
    assert_same_records(dataset, undisturbed)
    keys = Dataset(dataset).manifest["key"].to_pylist()
    assert len(keys) == len(set(keys))


def soak_config(teacher: Path, folder: Path) -> GenerateConfig:
    return generate_config(
        teacher,
        folder / "data",
        num_trajectories=TRAJECTORIES_AT_ONCE,
        trajectories_per_unit=2,
        num_inference_steps=20,
        num_workers=2,
    )


def main(seconds: str, folder: str | None = None) -> None:
    import ray

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder or temporary)
        root.mkdir(parents=True, exist_ok=True)
        config = soak_config(save_pipeline(tiny_dit(), root / "teacher"), root)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        config.ray_address = ray.get_runtime_context().gcs_address
        info = soak(config, root, float(seconds), seed=time.time_ns())
        ray.shutdown()
        check(root / "data", generate(replace(config, output_dir=str(root / "undisturbed"))))
        units = len(list((root / "data" / "commits").glob("[0-9]*.json")))
        print(json.dumps({"seconds": float(seconds), "units": units} | info | {"ok": True}))


if __name__ == "__main__":
    main(*sys.argv[1:])
