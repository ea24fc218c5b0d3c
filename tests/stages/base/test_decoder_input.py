from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, LTXPipeline
from torch import Tensor

from stages.base.decoder_input import follows_convention, to_decoder_input
from stages.base.sampling import Request, decoder_input_of, sample, undecoded
from tests.pipelines_zoo.gathered import gather


def packed_by_flux(latents: Tensor) -> Tensor:
    n, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, n, channels, height, width)


def packed_by_ltx(latents: Tensor) -> Tensor:
    return LTXPipeline._pack_latents(latents, patch_size=1, patch_size_t=1)


@pytest.mark.parametrize(
    ("pack", "shape"), [(packed_by_flux, (4, 6, 10)), (packed_by_ltx, (8, 3, 6, 10)), (torch.clone, (4, 6, 10))]
)
def test_packed_latents_are_unpacked(pack: Any, shape: tuple[int, ...]) -> None:
    latents = torch.randn(2, *shape)
    assert torch.equal(to_decoder_input({}, pack(latents), shape), latents)


def test_a_single_frame_may_have_an_axis() -> None:
    latents = torch.randn(2, 4, 1, 6, 10)
    assert torch.equal(to_decoder_input({}, latents, (4, 6, 10)), latents[:, :, 0])
    assert torch.equal(to_decoder_input({}, latents[:, :, 0], (4, 1, 6, 10)), latents)


def test_the_normalisation_is_undone() -> None:
    latents = torch.randn(2, 2, 3, 5)
    scaled = {"scaling_factor": 0.5, "shift_factor": 0.25}
    assert torch.equal(to_decoder_input(scaled, latents, (2, 3, 5)), latents / 0.5 + 0.25)
    mean, std = torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.tensor([2.0, 4.0]).view(2, 1, 1)
    by_channel = {"latents_mean": [1.0, -1.0], "latents_std": [2.0, 4.0]}
    assert torch.equal(to_decoder_input(by_channel, latents, (2, 3, 5)), latents * std + mean)
    assert torch.equal(to_decoder_input(by_channel | scaled, latents, (2, 3, 5)), latents * std / 0.5 + mean)


@pytest.mark.parametrize(
    "latents", [torch.ones(1, 4, 6), torch.ones(1, 14, 16), torch.ones(1, 15, 4), torch.ones(1, 60, 5)]
)
def test_latents_of_another_shape_are_refused(latents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"instead of latents \[4, 6, 10\]"):
        to_decoder_input({}, latents, (4, 6, 10))
    assert not follows_convention({}, latents, torch.ones(1, 4, 6, 10))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("FluxPipeline (true CFG)", [4, 8, 8]),
        ("LTXConditionPipeline", [8, 3, 8, 8]),
        ("DiTPipeline", [4, 8, 8]),
        ("CogVideoXImageToVideoPipeline", None),
        ("ErnieImagePipeline", None),
        ("IFPipeline", None),
    ],
)
def test_whether_a_pipeline_decodes_by_convention_is_tried(name: str, shape: list[int] | None) -> None:
    specimen = gather()[name]
    pipe = specimen.build()
    with undecoded(pipe) as kept:
        sample(pipe, Request([dict(specimen.conditions[0])], [0], 3, dict(specimen.arguments)), 3.0)
    assert decoder_input_of(pipe, kept) == shape
