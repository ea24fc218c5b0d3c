"""Flux, and image transformers derived from it."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests.pipelines_zoo.encoders import bytes_tokenizer, language_model, mistral3, qwen3
from tests.pipelines_zoo.images import SHORT, SMALL, shifting, stirred
from tests.pipelines_zoo.specimen import Specimen
from tests.support.families import WIDTH, chroma, clip, enliven, t5, vae


def flux_transformer(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    return enliven(FluxTransformer2DModel(**config | changes))


def flux_parts(**changes: Any) -> dict[str, Any]:
    text = t5()
    return {
        "transformer": flux_transformer(**changes),
        "vae": vae(4),
        "scheduler": shifting(),
        **clip(),
        "tokenizer_2": text["tokenizer"],
        "text_encoder_2": text["text_encoder"],
    }


def flux() -> Any:
    """Embedded guidance, and guidance by two passes beside it."""
    return FluxPipeline(**flux_parts())


def flux2_transformer(text: int, guidance: bool) -> nn.Module:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    return stirred(transformer)


def flux2_vae() -> nn.Module:
    return AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def flux2_klein() -> Any:
    """Position ids for texts and pictures, modulation shared by the blocks, attention and feed-forward in one layer."""
    return Flux2KleinPipeline(
        transformer=flux2_transformer(2 * WIDTH, guidance=False),
        vae=flux2_vae(),
        scheduler=shifting(),
        **qwen3(causal=True),
    )


def flux2() -> Any:
    """Embedded guidance only, without two passes."""
    return Flux2Pipeline(
        transformer=flux2_transformer(2 * WIDTH, guidance=True),
        vae=flux2_vae(),
        scheduler=shifting(),
        **mistral3(),
    )


def bria() -> Any:
    """Both rows in one call; position ids without a batch dimension."""
    transformer = BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 8, 8],
    )
    return BriaPipeline(transformer=stirred(transformer), vae=vae(4), scheduler=shifting(), **t5())


def bria_fibo() -> Any:
    """The outputs of every layer of the text encoder as a list, and a mask inside a dictionary of arguments."""
    transformer = BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        text_encoder_dim=WIDTH,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 8, 8],
    )
    small = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    text = language_model(SmolLM3ForCausalLM, SmolLM3Config, bytes_tokenizer(), vocab_size=128001)
    return BriaFiboPipeline(transformer=stirred(transformer), vae=small.eval(), scheduler=shifting(), **text)


ZOO: dict[str, Specimen] = {
    "FluxPipeline (true CFG)": Specimen(flux, {**SMALL, **SHORT, "negative_prompt": ""}),
    "Flux2KleinPipeline": Specimen(flux2_klein, {**SMALL, **SHORT, "text_encoder_out_layers": [1, 2]}),
    "Flux2Pipeline": Specimen(flux2, {**SMALL, "max_sequence_length": 64, "text_encoder_out_layers": [1, 2]}),
    "ChromaPipeline": Specimen(chroma, {**SMALL, **SHORT}),
    "BriaPipeline": Specimen(bria, {**SMALL, **SHORT}),
    "BriaFiboPipeline": Specimen(bria_fibo, {"height": 64, "width": 64, "max_sequence_length": 32}),
}
