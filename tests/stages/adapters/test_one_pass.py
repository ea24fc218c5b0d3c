from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline

from stages.adapters import GuidanceAdapter
from stages.errors import UserError
from stages.evaluate.comparisons import counted
from stages.sampling import undecoded
from tests.conftest import tiny_dit
from tests.stages.adapters.test_contract import new_adapter

LABELS = [1, 2, 3]


def final(pipe: DiTPipeline, scale: float | None = None) -> tuple[torch.Tensor, int]:
    """Final latents, and denoiser evaluations."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(LABELS))]
    options = {} if scale is None else {"guidance_scale": scale}
    with undecoded(pipe) as latents, counted(pipe.transformer) as count:
        pipe(LABELS, generator=generators, num_inference_steps=4, output_type="pt", **options)
    return latents[0], count[0]


@pytest.fixture
def pipe() -> DiTPipeline:
    return tiny_dit()


@pytest.fixture
def adapter(pipe: DiTPipeline) -> GuidanceAdapter:
    return new_adapter(pipe.transformer, "modulated_low_rank")


def test_attached_a_pipeline_makes_half_the_evaluations(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    _, two_passes = final(pipe, 3.0)
    adapter.attach(pipe)
    _, one_pass = final(pipe, 3.0)
    assert (two_passes, one_pass) == (2 * 4 * len(LABELS), 4 * len(LABELS))


def test_its_guidance_scale_is_the_adapters(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    unguided, _ = final(pipe, 1.0)
    adapter.attach(pipe)
    assert torch.equal(final(pipe, 1.0)[0], unguided)
    at_default, at_two = final(pipe)[0], final(pipe, 2.0)[0]
    assert torch.equal(at_default, final(pipe, 4.0)[0])
    assert not torch.allclose(at_two, at_default, atol=1e-3)
    with adapter.guidance_scale(1.0):
        assert torch.equal(final(pipe, 3.0)[0], unguided)
    with adapter.guidance_scale([2.0, 4.0, 1.0]):
        mixed, _ = final(pipe)
    for i, alone in enumerate([at_two, at_default, unguided]):
        torch.testing.assert_close(mixed[i], alone[i], atol=1e-3, rtol=1e-3)


def test_attached_twice_is_refused(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    with pytest.raises(UserError, match="attached already: detach it first"):
        adapter.attach(pipe)


def test_detached_it_is_the_stock_pipeline_again(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    before = final(pipe, 3.0)
    adapter.attach(pipe)
    assert type(pipe).__name__ == "DiTPipeline"
    adapter.detach()
    assert type(pipe) is DiTPipeline
    after = final(pipe, 3.0)
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_an_attached_pipeline_is_saved_as_the_stock_one(
    pipe: DiTPipeline, adapter: GuidanceAdapter, tmp_path: Path
) -> None:
    adapter.attach(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert type(again) is DiTPipeline
    assert all(
        torch.equal(a, b) for a, b in zip(again.transformer.parameters(), pipe.transformer.parameters(), strict=True)
    )
    assert isinstance(copy.copy(pipe), DiTPipeline)
