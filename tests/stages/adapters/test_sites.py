from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from stages.adapters.sites import find_sites
from stages.errors import UserError
from tests.conftest import tiny_dit


def test_a_dit_has_its_self_attention_and_feed_forward() -> None:
    sites = find_sites(tiny_dit().transformer, ["attention", "feed_forward"])
    assert sites == {f"transformer_blocks.{i}.{name}": 16 for i in range(2) for name in ("attn1", "ff")}
    assert list(find_sites(tiny_dit().transformer, ["feed_forward"])) == [
        "transformer_blocks.0.ff",
        "transformer_blocks.1.ff",
    ]


def test_a_unet_has_every_cross_attention_up_stages_included() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    sites = find_sites(unet, ["attention"])
    expected = {name for name, _ in unet.named_modules() if name.endswith("attn2")}
    assert set(sites) == expected
    assert sum(name.startswith("up_blocks") for name in sites) == 2
    assert {name: unet.get_submodule(name).out_dim for name in sites} == sites


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="unknown kind norm"):
        find_sites(tiny_dit().transformer, ["norm"])
    with pytest.raises(UserError, match="no site"):
        find_sites(tiny_dit().vae.quant_conv, ["attention"])
