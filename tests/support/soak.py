"""SIGKILL at random moments to the workers of a run of generation, to its driver, or to both, and what is there in the end.

python -m tests.support.soak 120 [FOLDER]

A real Ray on this machine, the real command with a tiny teacher and many small units. Whenever the command was killed, it is
given again; whenever all is made, it is told to make more. So many seconds after the first worker is there, it is left in peace;
then everything is hashed, and compared with what an undisturbed run makes. Prints one JSON line.
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
SECONDS_BETWEEN = 2.0  # kills, on average
TRAJECTORIES_AT_ONCE = 400  # more of them each time, in units of two
MOST_SECONDS = 240.0  # that a run left in peace may take


def start_command(config: GenerateConfig, log: Path) -> subprocess.Popen[bytes]:
    """`python -m pipeline.generate` as a process in a group of its own; what it says is added to a file."""
    file = log.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    overrides = [sys.executable, "-m", "pipeline.generate", "--config", str(file)]
    with log.open("ab") as output:
        return subprocess.Popen(overrides, stdout=output, stderr=output, start_new_session=True)


def kill_command(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a command and whatever else is in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(reached: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached"
        time.sleep(0.05)


def worker_processes() -> list[psutil.Process]:
    """The workers of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "ray::TeacherWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def soak(config: GenerateConfig, folder: Path, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Kill for so many seconds, then let the command come to its end; how often what was killed.

    `config` tells at the end how much there is.
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
                what = chance.choices((WORKER, DRIVER, BOTH), (3, 1, 1))[0]
                if what != DRIVER:
                    chance.choice(workers).kill()
                if what != WORKER:
                    kill_command(process)
                kills[what] += 1
        while process.wait(MOST_SECONDS):
            process, commands = start_command(config, log), commands + 1
    finally:
        kill_command(process)
    return {"kills": dict(kills), "commands": commands}


def check(dataset: Path, undisturbed: Path) -> None:
    """Everything is there, once, and as it would have been."""
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
