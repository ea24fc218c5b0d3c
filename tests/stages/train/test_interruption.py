"""A run that is killed at any moment and resumed ends with the same weights, optimizer and loss, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stages.train import checkpoint
from stages.train.best import BEST
from stages.train.checkpoint import find_checkpoint, load_checkpoint
from stages.train.config import TrainConfig
from stages.train.trainer import Trainer
from tests.conftest import train_config

SPAWN = multiprocessing.get_context("forkserver")  # a process that has imported everything, and has no threads yet
SPAWN.set_forkserver_preload([__name__])
STEPS = 12
FAULTS = [
    "first step", "a step between checkpoints", "a step after a checkpoint", "writing a checkpoint",
    "before a checkpoint is in place", "removing an older checkpoint", "writing the adapter",
]  # fmt: skip


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any], fault: Callable[..., Any] = die) -> Callable[..., Any]:
    """Wrap the function so that its n-th call meets a fault instead."""
    calls = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return fault(*args, **kwargs) if calls == number else function(*args, **kwargs)

    return faulty


def half_written(state: dict[str, Any], file: Any) -> None:
    file.write(os.urandom(1000))
    file.flush()
    die()


def install(fault: str) -> None:
    step, name = Trainer.train_step, "train_step"
    if fault == "first step":
        setattr(Trainer, name, at_call(1, step))
    elif fault == "a step between checkpoints":
        setattr(Trainer, name, at_call(7, step))
    elif fault == "a step after a checkpoint":
        setattr(Trainer, name, at_call(9, step))
    elif fault == "writing a checkpoint":
        vars(checkpoint)["_save"] = at_call(2, checkpoint._save, half_written)
    elif fault == "before a checkpoint is in place":
        vars(os)["fsync"] = at_call(3, os.fsync)  # of the second file: one call per file, and one for its folder
    elif fault == "removing an older checkpoint":
        setattr(Path, "unlink", at_call(3, Path.unlink))  # noqa: B010
    elif fault == "writing the adapter":
        vars(safetensors.torch)["save"] = die
    elif fault == "writing the second best adapter":
        vars(safetensors.torch)["save"] = at_call(2, safetensors.torch.save)
    else:
        raise ValueError(fault)


def train(config: TrainConfig, fault: str | None = None) -> None:
    torch.set_num_threads(1)
    if fault is not None:
        install(fault)
    Trainer(config).run()


def run(config: TrainConfig, fault: str | None = None, kill_after: float | None = None) -> int | None:
    """Train in a subprocess and return its exit code."""
    process = SPAWN.Process(target=train, args=(config, fault))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def config_of(data: Path, output: Path) -> TrainConfig:
    return train_config(data, output, max_train_steps=STEPS, use_ema=True, resume_from_checkpoint="latest")


def outcome(output: Path) -> tuple[bytes, dict[str, Any]]:
    """The adapter's weights, and the state after the last step."""
    path = find_checkpoint(output / "checkpoints", "latest")
    assert path is not None
    state = load_checkpoint(path)
    del state["seconds"]
    return (output / "adapter_model.safetensors").read_bytes(), state


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.fixture(scope="module")
def undisturbed(shared_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed")
    assert run(config_of(shared_dataset, output)) == 0
    return outcome(output)


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_at_a_chosen_moment(
    shared_dataset: Path, undisturbed: tuple[bytes, dict[str, Any]], tmp_path: Path, fault: str
) -> None:
    config = config_of(shared_dataset, tmp_path)
    assert run(config, fault) == -signal.SIGKILL
    assert run(config) == 0
    assert_same(outcome(tmp_path), undisturbed)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("fault", ["a step after a checkpoint", "writing the second best adapter"])
def test_the_best_adapter_is_kept_over_a_kill(shared_dataset: Path, tmp_path: Path, fault: str) -> None:
    undisturbed, disturbed = (
        replace(config_of(shared_dataset, tmp_path / name), validation_steps=3) for name in ("undisturbed", "disturbed")
    )
    assert run(undisturbed) == 0
    assert run(disturbed, fault) == -signal.SIGKILL
    assert run(disturbed) == 0
    assert_same(*(outcome(Path(config.output_dir)) for config in (undisturbed, disturbed)))
    one, other = (
        {path.name: path.read_bytes() for path in Path(config.output_dir, BEST).glob("[!.]*")}
        for config in (undisturbed, disturbed)
    )
    assert one == other
    assert one.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.long
def test_killed_at_random_until_it_is_done(shared_dataset: Path, tmp_path: Path) -> None:
    undisturbed, disturbed = (
        replace(config_of(shared_dataset, tmp_path / name), checkpointing_steps=1, max_train_steps=200)
        for name in ("undisturbed", "disturbed")
    )
    assert run(undisturbed) == 0
    chance, patience, killed = random.Random(0), 0.3, 0
    while (code := run(disturbed, kill_after=chance.uniform(0, patience))) == -signal.SIGKILL:
        killed, patience = killed + 1, patience * 1.15
    assert code == 0
    assert killed >= 1
    assert_same(*(outcome(Path(config.output_dir)) for config in (undisturbed, disturbed)))
