"""A base that is split over processes: all of them run the same passes, whatever their records are."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from stages.base.arguments import LENGTH
from stages.records.dataset import Dataset
from stages.train.base import load_base
from stages.train.batch import Batch
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.window import load
from tests.conftest import small_adapter
from tests.support.prompted import prompted_dataset

TEXT = "encoder_hidden_states"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompted_dataset(tmp_path_factory.mktemp("prompted"))


def student_of(dataset: Dataset) -> Student:
    torch.manual_seed(0)
    student = Student.create(dataset, small_adapter(), load_base(dataset))
    for parameter in student.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return student


def batch_of(dataset: Dataset, rank: int) -> Batch:
    """The first process's records have no guidance and one length, those of the second have three lengths."""
    window = load(dataset, [*map(SelectedSample, dataset.manifest.to_pylist())])
    batch = window.take(torch.arange(3)).to("cpu", torch.float32)
    if rank == 0:
        return replace(batch, scale=torch.ones(3))
    return replace(batch, cond=batch.cond | {TEXT + LENGTH: torch.tensor([9, 5, 7])})


def outcome(student: Student, batch: Batch) -> list[Tensor]:
    """Predictions with and without guidance, and the gradients after the first."""
    prediction = student.predict(batch)
    if prediction.requires_grad:
        prediction.square().mean().backward()
    gradients = [parameter.grad for parameter in student.adapter.parameters() if parameter.grad is not None]
    with torch.no_grad():
        return [prediction.detach(), student.predict(batch, guided=False), *gradients]


def split_outcome(rank: int, data: Path, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    dataset = Dataset(data)
    student = student_of(dataset)
    student.shard("cpu")
    torch.save(outcome(student, batch_of(dataset, rank)), data.parent / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_processes_with_other_lengths_and_scales_wait_for_none(prompted: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn(split_outcome, (prompted, port), nprocs=2)
    dataset = Dataset(prompted)
    for rank in range(2):
        expected, found = (
            outcome(student_of(dataset), batch_of(dataset, rank)),
            torch.load(prompted.parent / f"{rank}.pt"),
        )
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
