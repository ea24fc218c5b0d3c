"""Pipelines with a UNet, and older families."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    LDMTextToImagePipeline,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
    VQModel,
)
from torch import nn

from tests.pipelines_zoo.encoders import two_clips
from tests.pipelines_zoo.specimen import Specimen
from tests.support import families
from tests.support.families import NO_CHECKER, WIDTH, clip, enliven, t5, unet, vae

SMALL = {"height": 32, "width": 32}
SHORT = {**SMALL, "max_sequence_length": 32}
XL_UNET = {
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}


def ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, **changes)


def stable_diffusion(kind: type, **changes: Any) -> Any:
    """Make a pipeline of a class from the components of Stable Diffusion, some replaced by `changes`."""
    parts = {"vae": vae(), "unet": unet(), "scheduler": ddim(beta_schedule="scaled_linear"), **clip(), **NO_CHECKER}
    return fitted(kind, parts | changes)


def fitted(kind: type, parts: dict[str, Any]) -> Any:
    """Make a pipeline from those components that its class takes."""
    wanted = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in parts.items() if name in wanted})


def stable_diffusion_xl(kind: type, **changes: Any) -> Any:
    parts = {"vae": vae(), "unet": unet(**XL_UNET), "scheduler": EulerDiscreteScheduler(), **two_clips()}
    return kind(**parts | changes)


def remade(kind: type, family: str, **changes: Any) -> Any:
    """Make a pipeline with perturbed-attention guidance from the components of a family."""
    return fitted(kind, families.FAMILIES[family]().components | changes)


def pixart_alpha() -> Any:
    parts = families.pixart_sigma().components
    return PixArtAlphaPipeline(**parts)


def movq() -> VQModel:
    return VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()


def kandinsky_3() -> Any:
    denoiser = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=WIDTH,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", steps_offset=1)
    return Kandinsky3Pipeline(unet=enliven(denoiser), scheduler=scheduler, movq=movq(), **t5())


def simple_unet(**changes: Any) -> nn.Module:
    """Make a UNet with the blocks of Kandinsky 2 and DeepFloyd IF, which also predict a variance."""
    config = {
        "out_channels": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (16, 32),
        "encoder_hid_dim": WIDTH,
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
    }
    return unet(**config | changes)


def motion(channels: tuple[int, ...] = (8, 16), **changes: Any) -> MotionAdapter:
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        **changes,
    )
    return enliven(adapter)


def deepfloyd() -> Any:
    """Pixels, no decoder, and a variance beside the prediction."""
    denoiser = simple_unet(
        in_channels=3,
        out_channels=6,
        sample_size=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        act_fn="gelu",
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range")
    return IFPipeline(unet=denoiser, scheduler=scheduler, watermarker=None, **t5(), **NO_CHECKER)


def latent_diffusion() -> Any:
    text = clip(length=77)
    return LDMTextToImagePipeline(
        vqvae=vae(), bert=text["text_encoder"], tokenizer=text["tokenizer"], unet=unet(), scheduler=ddim()
    )


ZOO: dict[str, Specimen] = {
    "StableDiffusionPAGPipeline": Specimen(
        lambda: remade(StableDiffusionPAGPipeline, "stable_diffusion", requires_safety_checker=False)
    ),
    "StableDiffusionXLPAGPipeline": Specimen(lambda: remade(StableDiffusionXLPAGPipeline, "stable_diffusion_xl")),
    "StableDiffusion3PAGPipeline": Specimen(
        lambda: remade(StableDiffusion3PAGPipeline, "stable_diffusion_3", pag_applied_layers="blocks.1"),
        SHORT,
    ),
    "PixArtSigmaPAGPipeline": Specimen(
        lambda: remade(PixArtSigmaPAGPipeline, "pixart_sigma", pag_applied_layers="blocks.1"),
        {**SHORT, "use_resolution_binning": False, "clean_caption": False},
    ),
    "PixArtAlphaPipeline": Specimen(pixart_alpha, {**SHORT, "use_resolution_binning": False, "clean_caption": False}),
    "Kandinsky3Pipeline": Specimen(kandinsky_3, SMALL),
    "AnimateDiffPipeline": Specimen(
        lambda: AnimateDiffPipeline(vae=vae(), unet=unet(), motion_adapter=motion(), scheduler=ddim(), **clip()),
        {"num_frames": 3},
    ),
    "AnimateDiffSDXLPipeline": Specimen(
        lambda: stable_diffusion_xl(AnimateDiffSDXLPipeline, motion_adapter=motion(use_motion_mid_block=False)),
        {"num_frames": 3},
    ),
    "IFPipeline": Specimen(deepfloyd, {"clean_caption": False}),
    "LDMTextToImagePipeline": Specimen(latent_diffusion, SMALL),
}
