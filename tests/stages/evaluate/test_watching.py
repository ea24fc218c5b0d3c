from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.base.sampling import Request
from stages.evaluate.comparisons import CFG, CFG_FIRST_50, Setting, sample_setting
from stages.evaluate.watching import counted
from tests.pipelines_zoo.gathered import gather
from tests.stages.evaluate.test_first_steps import AdapterStub


class OfLists(nn.Module):
    """A denoiser that is given its samples in a list, as Z-Image's."""

    def forward(self, x: list[Tensor], t: Any) -> list[Tensor]:
        return x


def test_samples_in_a_list_are_counted_one_by_one() -> None:
    denoiser = OfLists()
    with counted(denoiser) as count:
        denoiser([torch.zeros(16, 1, 4, 4)] * 2, t=3)
    assert count == [2]
    assert "forward" not in vars(denoiser)


def test_guidance_ends_for_every_denoiser_of_a_pipeline() -> None:
    """Wan 2.2 goes on with its second denoiser: there CFG on the first steps has ended."""
    specimen = gather()["WanPipeline (2.2)"]
    pipe = specimen.build()
    request = Request(list(specimen.conditions), [0, 1], 4, dict(specimen.arguments))
    adapter: Any = AdapterStub({"call": 1, "chunk": 0, "chunks": 1})
    whole, half = (sample_setting(pipe, adapter, Setting(method, 3.0), request) for method in (CFG, CFG_FIRST_50))
    assert (whole.denoiser_evaluations, half.denoiser_evaluations) == (2 * 4 * 2, (2 * 2 + 2) * 2)
