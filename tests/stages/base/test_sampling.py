from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.base.sampling import Request, decode, noise_seeds, sample, scale_keyword, undecoded
from stages.errors import UserError
from tests.conftest import tiny_dit
from tests.support.families import ARGUMENTS, PROMPTS, build


def test_undecoded_keeps_the_latents_that_would_have_been_decoded() -> None:
    pipe = tiny_dit()
    images = pipe([1], 2.0, torch.Generator().manual_seed(0), 3, "pt").images
    with undecoded(pipe) as latents:
        pipe([1], 2.0, torch.Generator().manual_seed(0), 3, "pt")
    assert latents[0].shape == (1, 4, 8, 8)
    torch.testing.assert_close((decode(pipe, latents[0]) + 1) / 2, images)


def test_a_video_is_shown_by_its_first_frame() -> None:
    pipe = build("wan")
    with undecoded(pipe) as latents:
        sample(pipe, Request([{"prompt": PROMPTS[0]}], [0], 2, ARGUMENTS["wan"]), 1.0)
    assert latents[0].ndim == 5
    assert decode(pipe, latents[0]).shape == (1, 3, 32, 32)


def test_the_argument_that_guides_by_two_passes_is_found() -> None:
    assert scale_keyword(build("stable_diffusion")) == "guidance_scale"
    assert scale_keyword(build("qwen_image")) == "true_cfg_scale"
    with pytest.raises(UserError, match="object cannot be guided: its call takes none of"):
        scale_keyword(object())


def test_negative_prompts_reach_the_pipeline() -> None:
    pipe = build("stable_diffusion")

    def final(**condition: Any) -> torch.Tensor:
        with undecoded(pipe) as latents:
            sample(pipe, Request([{"prompt": PROMPTS[0], **condition}], [0], 2, {}), 3.0)
        return latents[0]

    assert torch.equal(final(), final(negative_prompt=""))
    assert not torch.allclose(final(), final(negative_prompt=PROMPTS[1]), atol=1e-3)


def test_each_seed_and_each_image_has_noise_of_its_own() -> None:
    """Of a seed, torch's generator takes the lower 32 bits alone."""
    assert noise_seeds(0, range(3)) == [0, 1, 2]
    seeds = [seed for number in (0, 1, 2, 2**31 - 1) for seed in noise_seeds(number, range(100))]
    noise = {float(torch.randn((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(noise) == 400
