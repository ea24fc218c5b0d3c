"""Derivatives of Stable Diffusion: other guidance, other inputs, other outputs."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    SemanticStableDiffusionPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionLDM3DPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionSAGPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)

from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.unets import SMALL, ddim, stable_diffusion
from tests.support.families import WIDTH, clip, enliven, unet, vae


def text_to_video() -> Any:
    denoiser = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    return TextToVideoSDPipeline(vae=vae(), unet=enliven(denoiser), scheduler=ddim(), **clip())


def depth_too() -> Any:
    """Pictures of six channels, the last three for depth."""
    autoencoder = AutoencoderKL.from_config(vae().config, in_channels=6, out_channels=6).eval()
    return stable_diffusion(StableDiffusionLDM3DPipeline, vae=autoencoder, image_encoder=None)


GLIGEN = {"gligen_phrases": ["a seven"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]}
ZOO: dict[str, Specimen] = {
    "TextToVideoSDPipeline": Specimen(text_to_video, {**SMALL, "num_frames": 2}),
    "StableDiffusionGLIGENPipeline": Specimen(
        lambda: stable_diffusion(StableDiffusionGLIGENPipeline, unet=unet(attention_type="gated")),
        {**SMALL, **GLIGEN},
    ),
    "StableDiffusionSAGPipeline": Specimen(lambda: stable_diffusion(StableDiffusionSAGPipeline), SMALL),
    "SemanticStableDiffusionPipeline": Specimen(lambda: stable_diffusion(SemanticStableDiffusionPipeline), SMALL),
    "StableDiffusionLDM3DPipeline": Specimen(depth_too, SMALL),
    "StableDiffusionPanoramaPipeline": Specimen(
        lambda: stable_diffusion(StableDiffusionPanoramaPipeline), {"height": 32, "width": 48}
    ),
}
