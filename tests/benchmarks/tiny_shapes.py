"""Small counterparts of some real denoisers, for running the benchmarks without a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from tests.support.families import WIDTH
from tests.support.real_shapes import DIT, POOLED, SD35, SDXL_UNET, SHAPES, TIME_IDS, TOKENS, Shape

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
}
XL = {name: SDXL_UNET[name] for name in ("use_linear_projection", "addition_embed_type")} | {
    "cross_attention_dim": 2 * WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}
SMALL_DIT = DIT | {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SMALL_SD3 = SD35 | {
    "sample_size": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}

TINY_SHAPES = [
    Shape("tiny_sd15", "tiny SD 1.5", partial(UNet2DConditionModel, **UNET), (4, 8, 8), {TOKENS: [12, WIDTH]}),
    Shape("tiny_sdxl", "tiny SDXL", partial(UNet2DConditionModel, **UNET | XL), (4, 8, 8), {TOKENS: [12, 2 * WIDTH], POOLED: [WIDTH], TIME_IDS: [6]}),
    Shape("tiny_dit_xl_2_256", "tiny DiT", partial(DiTTransformer2DModel, **SMALL_DIT), (4, 8, 8), {"class_labels": []}),
    Shape("tiny_sd3", "tiny SD 3.5", partial(SD3Transformer2DModel, **SMALL_SD3), (16, 8, 8), {TOKENS: [24, WIDTH], "pooled_projections": [WIDTH]}),
]  # fmt: skip


def shape_named(config: str) -> Shape:
    """Return a real shape, or a tiny one, by name."""
    return next(shape for shape in [*TINY_SHAPES, *SHAPES] if shape.config == config)
