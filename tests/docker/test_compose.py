"""compose.yaml: against the published schema and the Dockerfile; its commands run on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import yaml
from obstore.store import S3Store

from stages.generate.config import GenerateConfig
from stages.train.config import TrainConfig
from tests.docker.files import DOCKER, PROJECT, stages, start_options, understood

BIN = Path(sys.executable).parent


def substituted(text: str) -> str:
    """Return a text as Docker Compose reads it with no variable set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


def environment() -> dict[str, str]:
    lines = (DOCKER / "development.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load(substituted((DOCKER / "compose.yaml").read_text()))["services"]


def test_it_matches_the_published_schema(tmp_path: Path) -> None:
    """The schema of the compose specification comes with check-jsonschema."""
    words = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*words, DOCKER / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("init: true", "inti: true"))
    assert subprocess.run([*words, wrong], capture_output=True).returncode == 1


def test_every_own_image_is_a_target_of_the_dockerfile(services: dict[str, Any]) -> None:
    built = {name: service for name, service in services.items() if "build" in service}
    assert set(built) == {"head", "worker", "gpu-worker", "generate", "train"}
    for service in built.values():
        target = service["build"]["target"]
        assert target in stages()
        assert service["image"] == f"{PROJECT}:{target}"
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")


def test_every_other_image_is_pinned(services: dict[str, Any]) -> None:
    for service in services.values():
        assert "build" in service or not service["image"].endswith(":latest")
        assert ":" in service["image"]


def test_each_service_waits_for_those_it_needs(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, dependency in service.get("depends_on", {}).items():
            assert name in services
            if dependency["condition"] == "service_healthy":
                assert services[name]["healthcheck"]
    order, name = [], "train"
    while needs := services[name].get("depends_on"):
        order.append(name := next(iter(needs)))
    assert order == ["generate", "bucket", "store"]


def test_the_commands_are_valid_and_share_the_dataset(services: dict[str, Any]) -> None:
    generated, trained = understood(services["generate"]["command"]), understood(services["train"]["command"])
    assert isinstance(generated, GenerateConfig)
    assert isinstance(trained, TrainConfig)
    assert generated.output_dir == trained.data_dir == "s3://datasets/mnist_dit"
    assert generated.ray_address == "auto"
    assert "mb --ignore-existing store/datasets" in services["bucket"]["command"][0]
    assert any(trained.output_dir.startswith(volume.split(":")[1]) for volume in services["train"]["volumes"])


def test_rays_own_options_are_valid(services: dict[str, Any]) -> None:
    head, worker = (start_options(services[name]["command"][2:]) for name in ("head", "worker"))
    assert (head["head"], head["port"], head["num_cpus"], head["block"]) == (True, 6379, 0, True)
    assert (worker["address"], worker["block"]) == (f"head:{head['port']}", True)


def test_shellcheck_accepts_the_commands_of_store_and_bucket(services: dict[str, Any], tmp_path: Path) -> None:
    for name in ("store", "bucket"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\n" + services[name]["command"][0])
        done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_obstore_reads_the_development_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write to a store on this machine.

    The variables' names are right, plain http is allowed, and only the first commit wins.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in environment().items():
            monkeypatch.setenv(name, value.replace("store:9000", f"{host}:{port}"))
        boto3.client("s3").create_bucket(Bucket="datasets")
        store = S3Store("datasets")
        obstore.put(store, "commit", b"first", mode="create")
        with pytest.raises(obstore.exceptions.AlreadyExistsError):
            obstore.put(store, "commit", b"second", mode="create")
        assert bytes(obstore.get(store, "commit").bytes()) == b"first"
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def run_service(tmp_path: Path) -> Iterator[Callable[[list[str], list[str]], subprocess.Popen]]:
    """Start a service's command on this machine, with free local hosts and ports, and additional arguments."""
    import tempfile

    ports = {"6379": free_port(), "8265": free_port(), "52365": free_port()}
    started: list[subprocess.Popen] = []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = inherited | environment() | {"PATH": f"{BIN}:{os.environ['PATH']}"}

    def start(command: list[str], more: list[str]) -> subprocess.Popen:
        words = [re.sub(r"\b(head|localhost):", "127.0.0.1:", word.replace("0.0.0.0", "127.0.0.1")) for word in command]
        for port, free in ports.items():
            words = [word.replace(port, str(free)) for word in words]
        more = [word.format(dashboard=ports["8265"], agent=ports["52365"], temp=temp) for word in more]
        with (tmp_path / f"{len(started)}.log").open("w") as log:
            process = subprocess.Popen([*words, *more], env=env, stdout=log, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    # A short path, because it holds Ray's sockets, whose paths are limited to 107 characters.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as temp:
        yield start
        for process in reversed(started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


@pytest.mark.long
def test_head_worker_and_driver_work_together(
    services: dict[str, Any], run_service: Callable[[list[str], list[str]], subprocess.Popen], tmp_path: Path
) -> None:
    """Run the three commands unchanged, token included, but for hosts, ports, size and folder of the dataset."""

    def logs() -> str:
        return "\n".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))

    local = ["--node-ip-address=127.0.0.1", f"--ray-client-server-port={free_port()}"]
    elsewhere = ["--dashboard-port={dashboard}", "--dashboard-agent-listen-port={agent}", "--temp-dir={temp}"]
    head = run_service(services["head"]["command"], [*local, *elsewhere])
    check = services["head"]["healthcheck"]
    for _ in range(check["retries"]):
        if run_service(check["test"][1:], []).wait(60) == 0:
            break
        assert head.poll() is None, logs()
        time.sleep(1)
    else:
        pytest.fail(logs())
    more = ["--num-cpus=1", f"--dashboard-agent-listen-port={free_port()}"]
    run_service(services["worker"]["command"], ["--node-ip-address=127.0.0.1", *more])
    small = ["num_trajectories=4", "trajectories_per_unit=2", "num_inference_steps=2", "num_workers=1", "device=cpu"]
    driver = run_service(services["generate"]["command"], [*small, f"output_dir={tmp_path / 'data'}"])
    assert driver.wait(300) == 0, logs()
    assert json.loads((tmp_path / "data" / "generation.json").read_text())["trajectories"] == 4
    assert shlex.join(small) in logs()
