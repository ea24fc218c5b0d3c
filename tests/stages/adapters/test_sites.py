from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    Flux2Transformer2DModel,
    MochiTransformer3DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from stages.adapters.sites import blocks_of, find_projections, find_sites, is_attention, is_feed_forward, width_axis
from stages.base.denoiser import denoiser_of, unflatten
from stages.errors import UserError
from tests.conftest import tiny_dit
from tests.stages.adapters.test_layers import inputs_of
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build


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


def of_layers(*names: str) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


@pytest.mark.parametrize(
    "names",
    [
        ("to_q", "to_k", "to_v", "to_out"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("to_query", "to_key", "to_value"),
        ("q_linear", "kv_linear", "proj"),
        ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv"),
        ("query_key_value", "dense"),
        ("to_qkv_mlp_proj", "to_out"),
        ("wq", "wk", "wv", "wo"),
        ("Wqkv", "out_proj"),
    ],
)
def test_attention_is_recognized_by_its_projections_under_any_names(names: tuple[str, ...]) -> None:
    assert is_attention(of_layers(*names))


@pytest.mark.parametrize(
    "names", [("to_q", "to_k"), ("kv_mapper",), ("linear_1", "linear_2"), ("queue", "keyed", "valued")]
)
def test_a_module_without_all_three_projections_is_no_attention(names: tuple[str, ...]) -> None:
    assert not is_attention(of_layers(*names))


def test_a_feed_forward_network_leads_back_to_its_width() -> None:
    assert is_feed_forward(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
    assert is_feed_forward(nn.ModuleDict({"w1": nn.Linear(8, 32), "w2": nn.Linear(32, 8), "w3": nn.Linear(8, 32)}))
    assert is_feed_forward(nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)))
    assert not is_feed_forward(nn.Sequential(nn.SiLU(), nn.Linear(8, 48)))
    assert not is_feed_forward(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 16)))
    assert not is_feed_forward(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Embedding(3, 8)))


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
DENOISERS: dict[str, tuple[Any, dict[str, int]]] = {
    "sana": (
        lambda: SanaTransformer2DModel(
            **HEADS, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=8, sample_size=8, in_channels=4, out_channels=4,
        ),
        {"transformer_blocks.{}.attn2": 2, "transformer_blocks.{}.ff": 2},
    ),
    "aura flow": (
        lambda: AuraFlowTransformer2DModel(
            **HEADS, num_mmdit_layers=2, num_single_dit_layers=1, joint_attention_dim=8, caption_projection_dim=16,
            sample_size=8, pos_embed_max_size=16,
        ),
        {
            "joint_transformer_blocks.{}.attn": 2, "joint_transformer_blocks.{}.ff": 2,
            "single_transformer_blocks.{}.attn": 1, "single_transformer_blocks.{}.ff": 1,
        },
    ),
    "flux 2": (
        lambda: Flux2Transformer2DModel(
            **HEADS, num_layers=2, num_single_layers=1, in_channels=4, joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2),
            timestep_guidance_channels=16,
        ),
        {
            "transformer_blocks.{}.attn": 2, "transformer_blocks.{}.ff": 2, "single_transformer_blocks.{}.attn": 1,
        },
    ),
    "mochi": (
        lambda: MochiTransformer3DModel(
            **HEADS, num_layers=2, pooled_projection_dim=8, text_embed_dim=8, time_embed_dim=8, in_channels=4,
        ),
        {"transformer_blocks.{}.attn1": 2, "transformer_blocks.{}.ff": 2, "time_embed.pooler": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DENOISERS)
def test_sites_are_found_in_denoisers_with_classes_of_their_own(kind: str) -> None:
    build, expected = DENOISERS[kind]
    with torch.device("meta"):
        sites = find_sites(build(), ["attention", "feed_forward"])
    assert set(sites) == {name.format(i) for name, count in expected.items() for i in range(count)}


def test_a_kind_without_sites_is_left_out_beside_one_with_sites() -> None:
    denoiser = of_layers("to_q", "to_k", "to_v")
    block = nn.ModuleDict({"attention": denoiser, "norm": nn.LayerNorm(8)})
    assert find_sites(block, ["feed_forward", "attention"]) == {"attention": [8, 8]}
    with pytest.raises(UserError, match="feed_forward: no site"):
        find_sites(block, ["feed_forward"])
    with pytest.raises(UserError, match="other: no site"):
        find_sites(block, ["attention", "other"])


def test_each_attention_of_a_list_is_a_site() -> None:
    attentions = nn.ModuleList(of_layers("to_q", "to_k", "to_v") for _ in range(3))
    assert list(find_sites(nn.ModuleDict({"attentions": attentions}), ["attention"])) == [
        f"attentions.{i}" for i in range(3)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_module_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost module that runs during attention is among those found by structure."""
    pipe = build(family)
    denoiser = denoiser_of(pipe)[1]
    inputs = inputs_of(pipe, prompt=PROMPTS, **ARGUMENTS.get(family, {}))
    running: list[str] = []
    attending = set[str]()
    compute = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: (attending.add(running[-1]), compute(*a, **k))[1]
    )
    for name, module in denoiser.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(lambda *_: running.pop() and None)
    with torch.no_grad():
        denoiser(**unflatten(inputs))
    found = {name for attentions, _ in blocks_of(denoiser) for name in attentions}
    assert attending
    assert attending <= found


def test_the_axis_of_the_width_follows_from_the_shape() -> None:
    assert width_axis((2, 5, 8), 8) == 2
    assert width_axis((2, 8, 5), 8) == 1
    assert width_axis((2, 8, 4, 8), 8) == 1
    assert width_axis((2, 3, 4, 5, 8), 8) == 4
    assert width_axis((2, 3, 4), 8) is None
