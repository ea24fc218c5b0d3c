"""The real denoisers' shapes on the meta device: sizes of adapters and records without any weights.

python -m tests.support.real_shapes families    prints the table of the families in stages/generate/README.md
python -m tests.support.real_shapes variants    prints the table of the variants' sizes in stages/adapters/README.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.conditioning import find_conditions
from stages.adapters.metadata import AdapterMetadata
from stages.base.arguments import Arguments, Axis, decoded, encoded
from stages.base.denoiser import MASK, latent_name

SD_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21_UNET = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
SD35 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
PIXART = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 8,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


@dataclass(frozen=True)
class Shape:
    """A published denoiser's configuration.

    Attributes:
        config: file of `configs/generate`.
        title: name in the table.
        latent: `[c, ...]` of one record, in the denoiser's layout.
        cond: shape of the conditions that a trajectory stores, by the denoiser's names.
        calls: layout of a guided step.
        constants: the denoiser's other arguments, the same in every call, as `dataset.json` stores them.
    """

    config: str
    title: str
    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    cond: dict[str, list[int]]
    calls: str = "one, doubled batch"
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def record_bytes(self) -> int:
        """Return the bytes of one record in half precision: its latent and its target."""
        return 2 * 2 * torch.Size(self.latent).numel()

    @property
    def condition_bytes(self) -> int:
        """Return the bytes of one trajectory's conditions in half precision."""
        return 2 * sum(torch.Size(shape).numel() for shape in self.cond.values())


QWEN = {"img_shapes": {"each": [[1, 64, 64]]}}
CHROMA = {name: encoded(torch.zeros(length, 3), 1) for name, length in (("img_ids", 4096), ("txt_ids", 512))}
TOKENS, POOLED, TIME_IDS = "encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"
SHAPES = [
    Shape("dit_xl_2_256", "DiT-XL/2 256", lambda: DiTTransformer2DModel(sample_size=32, **DIT), (4, 32, 32), {"class_labels": []}),
    Shape("dit_xl_2_512", "DiT-XL/2 512", lambda: DiTTransformer2DModel(sample_size=64, **DIT), (4, 64, 64), {"class_labels": []}),
    Shape("sd15", "SD 1.5", lambda: UNet2DConditionModel(**SD_UNET), (4, 64, 64), {TOKENS: [77, 768]}),
    Shape("sd21", "SD 2.1", lambda: UNet2DConditionModel(**SD21_UNET), (4, 96, 96), {TOKENS: [77, 1024]}),
    Shape("sdxl", "SDXL", lambda: UNet2DConditionModel(**SDXL_UNET), (4, 128, 128), {TOKENS: [77, 2048], POOLED: [1280], TIME_IDS: [6]}),
    Shape("sd3", "SD 3.5 medium", lambda: SD3Transformer2DModel(**SD35), (16, 128, 128), {TOKENS: [333, 4096], "pooled_projections": [2048]}),
    Shape("pixart_sigma", "PixArt-Sigma", lambda: PixArtTransformer2DModel(**PIXART), (4, 128, 128), {TOKENS: [300, 4096], "encoder_attention_mask": [300]}),
    Shape("qwen_image", "Qwen-Image", QwenImageTransformer2DModel, (4096, 64), {TOKENS: [128, 3584], f"{TOKENS}_mask": [128]}, "two", QWEN),
    Shape("chroma", "Chroma", ChromaTransformer2DModel, (4096, 64), {TOKENS: [512, 4096], "attention_mask": [4608]}, "two", CHROMA),
    Shape("wan", "Wan 2.1 1.3B", lambda: WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960), (16, 1, 60, 104), {TOKENS: [512, 4096]}, "two"),
]  # fmt: skip


@cache
def on_meta(config: str) -> nn.Module:
    """Make the denoiser of one of `SHAPES` on the meta device, without memory."""
    shape = next(shape for shape in SHAPES if shape.config == config)
    with torch.device("meta"):
        return shape.build()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def metadata_of(shape: Shape) -> AdapterMetadata:
    """Return the metadata of an adapter for records of this shape."""
    tensors = {name: {"dtype": "float16" if sizes else "int64", "shape": sizes} for name, sizes in shape.cond.items()}
    return AdapterMetadata(conditions=find_conditions(tensors, 1000), scale_range=[1.0, 6.0])


def conditions_of(shape: Shape, n: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make up the conditions of n records of this shape, by the denoiser's names; masks mask nothing."""

    def made_up(name: str, sizes: list[int]) -> Tensor:
        if not sizes:
            return torch.zeros(n, dtype=torch.long, device=device)
        return (torch.ones if name.endswith(MASK) else torch.rand)(n, *sizes, device=device, dtype=dtype)

    return {name: made_up(name, sizes) for name, sizes in shape.cond.items()}


def arguments_of(shape: Shape, denoiser: nn.Module) -> Arguments:
    """Return the layout of a call's arguments."""
    places = {name: Axis() for name in (latent_name(denoiser), *shape.cond)}
    return Arguments(latent_name(denoiser), "timestep", places, shape.constants)


def inputs_of(shape: Shape, denoiser: nn.Module, n: int) -> dict[str, Any]:
    """Make up the flat arguments of one call for n samples, on the denoiser's device and in its precision."""
    like = next(denoiser.parameters())
    return {
        latent_name(denoiser): torch.randn(n, *shape.latent, device=like.device, dtype=like.dtype),
        "timestep": torch.full((n,), 500, device=like.device),
        **{name: decoded(value, like.device)(n) for name, value in shape.constants.items()},
        **conditions_of(shape, n, like.device, like.dtype),
    }


def adapter_for(shape: Shape, config: AdapterConfig) -> GuidanceAdapter:
    """Make an adapter for the real denoiser, also on the meta device."""
    denoiser = on_meta(shape.config)
    with torch.device("meta"):
        return GuidanceAdapter.for_denoiser(config, denoiser, metadata_of(shape), inputs_of(shape, denoiser, 3))


def row(shape: Shape) -> list[str]:
    denoiser, adapter = on_meta(shape.config), adapter_for(shape, AdapterConfig())
    return [
        shape.title,
        f"`{shape.config}`",
        f"{parameters(denoiser) / 1e6:,.0f} M",
        shape.calls,
        str(len(adapter.shapes)),
        f"{parameters(adapter) / 1e6:.1f} M, {parameters(adapter) / parameters(denoiser):.1%}",
        f"{shape.record_bytes / 1024:,.0f} KB",
        f"{shape.condition_bytes / 1024:,.0f} KB",
    ]


HEAD = [
    "teacher",
    "config",
    "denoiser",
    "calls a step",
    "sites",
    "default adapter",
    "a record",
    "its condition, per trajectory",
]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def table() -> str:
    """Return the table of the families."""
    return markdown(HEAD, [row(shape) for shape in SHAPES])


def sizes() -> str:
    """Return the table of the parameters that each variant adds to three bases with its default settings."""
    shapes = [shape for shape in SHAPES if shape.config in ("dit_xl_2_256", "sd15", "sdxl")]

    def cells(variant: str) -> list[str]:
        counts = [(parameters(adapter_for(s, AdapterConfig(variant))), parameters(on_meta(s.config))) for s in shapes]
        return [f"`{variant}`", *(f"{count / 1e6:.1f} M, {count / base:.2%}" for count, base in counts)]

    variants = [variant for variant in GuidanceAdapter.variants if variant != "full"]
    return markdown(["variant", *(shape.title for shape in shapes)], [cells(variant) for variant in variants])


TABLES = {"families": table, "variants": sizes}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m tests.support.real_shapes {'|'.join(TABLES)}")
    print(TABLES[sys.argv[1]]())
