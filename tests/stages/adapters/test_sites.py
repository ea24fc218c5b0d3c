from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from stages.adapters.sites import find_projections, find_sites
from stages.errors import UserError
from tests.conftest import tiny_dit


def test_a_dit_has_its_self_attention_and_feed_forward() -> None:
    sites = find_sites(tiny_dit().transformer, ["attention", "feed_forward"])
    assert sites == {f"transformer_blocks.{i}.{name}": [16, 16] for i in range(2) for name in ("attn1", "ff")}
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
    assert {name: unet.get_submodule(name).out_dim for name in sites} == {name: out for name, (_, out) in sites.items()}


def test_sites_are_chosen_by_pattern() -> None:
    denoiser = tiny_dit().transformer
    assert list(find_sites(denoiser, ["*.1.attn1", "*.0.ff"])) == [
        "transformer_blocks.0.ff",
        "transformer_blocks.1.attn1",
    ]
    with pytest.raises(
        UserError, match=r"\*.attn9: no site .* 4 attention and feed-forward modules, e.g. transformer_blocks.0"
    ):
        find_sites(denoiser, ["*.attn9"])


def test_a_lora_sits_at_the_linear_layers_of_the_sites() -> None:
    projections = find_projections(tiny_dit().transformer, ["*.0.attn1", "*.0.ff"])
    assert projections == {
        **{f"transformer_blocks.0.attn1.{name}": [16, 16] for name in ("to_q", "to_k", "to_v", "to_out.0")},
        "transformer_blocks.0.ff.net.0.proj": [16, 64],
        "transformer_blocks.0.ff.net.2": [64, 16],
    }


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="norm: no site"):
        find_sites(tiny_dit().transformer, ["norm"])
    with pytest.raises(UserError, match="no site"):
        find_sites(tiny_dit().vae.quant_conv, ["attention"])
