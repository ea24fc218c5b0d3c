"""A tiny pipeline with random weights for every family, made and saved without a download.

Stock initialisation makes networks that nearly ignore their condition; `enliven` makes the condition matter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPTS = ["a bold seven leaning right", "a thin zero"]
WIDTH = 32  # width of every text encoder


def enliven(denoiser: nn.Module, std: float = 0.2) -> nn.Module:
    """Give every zero-initialised layer weights, so that the condition reaches the output."""
    for parameter in denoiser.parameters():
        if parameter.ndim > 1 and float(parameter.detach().abs().max()) < 0.05:
            nn.init.normal_(parameter, std=std)
    return denoiser.eval().requires_grad_(False)


def trained(kind: Any, size: int = 400, text: str = "") -> Any:
    """Return a tokenizer of the class `kind`, trained on the prompts and the words of `text`."""
    return copy.deepcopy(_trained(kind, size, text))


@functools.cache
def _trained(kind: Any, size: int, text: str) -> Any:
    return kind().train_new_from_iterator([*PROMPTS, text], vocab_size=size)  # breaks ties at random: once


def clip(projection: bool = False, width: int = WIDTH, length: int = 12) -> dict[str, Any]:
    tokenizer = trained(CLIPTokenizer)
    tokenizer.model_max_length = length
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return {"tokenizer": tokenizer, "text_encoder": lively(model)}


def lively(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def t5(kind: str = "t5", width: int = WIDTH) -> dict[str, Any]:
    tokenizer = trained(T5Tokenizer, 60)
    config = {"d_model": width, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    model = UMT5EncoderModel(UMT5Config(**config)) if kind == "umt5" else T5EncoderModel(T5Config(**config))
    return {"tokenizer": tokenizer, "text_encoder": model.eval()}


def vae(channels: int = 4, blocks: int = 3) -> AutoencoderKL:
    """Make a VAE whose latents are 2^(blocks - 1) times smaller than the images."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
    ).eval()


def unet(**changes: Any) -> nn.Module:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    return enliven(UNet2DConditionModel(**config | changes))


NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion() -> Any:
    """Epsilon, Euler: the model input is scaled."""
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    return StableDiffusionPipeline(vae=vae(), unet=unet(), scheduler=scheduler, **clip(), **NO_CHECKER)


def stable_diffusion_v() -> Any:
    """The velocity, as SD 2.1 at 768 predicts it, DPM-Solver++."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", steps_offset=1)
    return StableDiffusionPipeline(vae=vae(), unet=unet(), scheduler=scheduler, **clip(), **NO_CHECKER)


def stable_diffusion_xl() -> Any:
    """Two text encoders, a pooled embedding and time ids."""
    one, two = clip(), clip(projection=True)
    return StableDiffusionXLPipeline(
        vae=vae(),
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        **one,
        tokenizer_2=two["tokenizer"],
        text_encoder_2=two["text_encoder"],
    )


def stable_diffusion_3() -> Any:
    """Flow matching, three text encoders, joint attention."""
    one, two, three = clip(projection=True), clip(projection=True), t5(width=2 * WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        out_channels=8,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=enliven(transformer),
        vae=vae(8),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **one,
        tokenizer_2=two["tokenizer"],
        text_encoder_2=two["text_encoder"],
        tokenizer_3=three["tokenizer"],
        text_encoder_3=three["text_encoder"],
    )


def pixart_sigma() -> Any:
    """Attention masks and a learned variance."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        transformer=enliven(transformer), vae=vae(), scheduler=DDIMScheduler(clip_sample=False), **t5()
    )


def qwen_image() -> Any:
    """Two calls per step, the conditional one first, and guidance that keeps the norm."""
    tokenizer = trained(Qwen2Tokenizer)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0},
            "vocab_size": len(tokenizer),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        transformer=enliven(transformer),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        tokenizer=tokenizer,
        text_encoder=lively(Qwen2_5_VLForConditionalGeneration(config)),
    )


def chroma() -> Any:
    """Two calls per step, and position ids that belong to no sample."""
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        transformer=enliven(transformer), vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(), **t5()
    )


def wan() -> Any:
    """A video model: two calls per step, latents with a time axis, UniPC on flow sigmas."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        transformer=enliven(transformer),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_spatial=4,
            scale_factor_temporal=2,
        ).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **t5("umt5"),
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind
    for kind in (
        stable_diffusion,
        stable_diffusion_v,
        stable_diffusion_xl,
        stable_diffusion_3,
        pixart_sigma,
        qwen_image,
        chroma,
        wan,
    )
}
# The call arguments that each family needs: small images, short prompts.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "stable_diffusion_3": {"height": 32, "width": 32, "max_sequence_length": 32},
    "pixart_sigma": {"height": 32, "width": 32, "max_sequence_length": 32},
    "qwen_image": {"height": 32, "width": 32},
    "chroma": {"height": 32, "width": 32, "max_sequence_length": 32},
    "wan": {"height": 32, "width": 32, "max_sequence_length": 32},
}


def build(family: str) -> Any:
    """Make a pipeline of the family, without progress bars and with the same weights each time."""
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(family: str, folder: Path) -> Path:
    build(family).save_pretrained(folder)
    return folder
