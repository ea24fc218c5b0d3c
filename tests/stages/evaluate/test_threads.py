from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stages.evaluate.threads import ONE_THREAD_BELOW, threads_that_pay


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def pipeline_of(width: int, device: str = "cpu") -> Any:
    with torch.device("meta"):
        return SimpleNamespace(unet=nn.Linear(width, 1000, bias=False), device=torch.device(device))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    ("pipe", "expected"),
    [
        (pipeline_of(10), 1),
        (pipeline_of(ONE_THREAD_BELOW // 1000), 3),
        (pipeline_of(10, "cuda"), 3),
    ],
)
def test_a_small_denoiser_on_the_cpu_uses_one_thread(pipe: Any, expected: int) -> None:
    with pytest.raises(RuntimeError), threads_that_pay(pipe):
        assert torch.get_num_threads() == expected
        raise RuntimeError
    assert torch.get_num_threads() == 3
