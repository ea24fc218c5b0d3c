"""Tiny pipelines of Wan and of its derivatives."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LucyEditPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)

from tests.pipelines_zoo.encoders import clip_vision
from tests.pipelines_zoo.pictures import picture, video
from tests.pipelines_zoo.specimen import PROMPTS, Specimen
from tests.support.families import WIDTH, enliven, lively, t5

WITH_PICTURES = tuple(condition | {"image": picture(seed)} for seed, condition in enumerate(PROMPTS))
WITH_VIDEOS = tuple(condition | {"video": video(seed)} for seed, condition in enumerate(PROMPTS))
SIZES = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_transformer(kind: Any = WanTransformer3DModel, **changes: Any) -> Any:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    return enliven(lively(kind(**config | changes)))


def wan_vae(channels: int = 4, **changes: Any) -> Any:
    """Make a VAE whose latents are 4 times smaller than the frames and 2 times fewer, unless `changes` differ."""
    config = {
        "base_dim": 8,
        "z_dim": channels,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
        "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
    }
    return AutoencoderKLWan(**config | changes).eval()


def wan_2_2() -> Any:
    """Two denoisers, each for a range of timesteps."""
    return WanPipeline(
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.875,
        vae=wan_vae(),
        scheduler=unipc(),
        **t5("umt5"),
    )


SEES_PICTURES = {"in_channels": 4 + 2 + 4, "image_dim": 8}


def wan_image_to_video() -> Any:
    """The denoiser takes the picture as channels of its latent and as tokens."""
    return WanImageToVideoPipeline(
        transformer=wan_transformer(**SEES_PICTURES),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **t5("umt5"),
        **clip_vision(),
    )


def skyreels(pipeline: Any = SkyReelsV2Pipeline, **changes: Any) -> Any:
    return pipeline(
        transformer=wan_transformer(SkyReelsV2Transformer3DModel, **changes),
        vae=wan_vae(),
        scheduler=unipc(),
        **t5("umt5"),
    )


def skyreels_diffusion_forcing() -> Any:
    """A timestep and a scheduler per frame."""
    return skyreels(SkyReelsV2DiffusionForcingPipeline)


def skyreels_image_to_video() -> Any:
    pipe = functools.partial(SkyReelsV2ImageToVideoPipeline, **clip_vision())
    return skyreels(pipe, **SEES_PICTURES)


def wan_2_2_small() -> Any:
    """One denoiser for all timesteps; a timestep per token."""
    return WanPipeline(
        transformer=wan_transformer(), expand_timesteps=True, vae=wan_vae(), scheduler=unipc(), **t5("umt5")
    )


def wan_vace() -> Any:
    """The control passes through separate blocks beside the others."""
    latents, masks = 2 * 4, 4 * 4
    transformer = wan_transformer(
        WanVACETransformer3DModel, num_layers=3, vace_layers=[0, 2], vace_in_channels=latents + masks
    )
    return WanVACEPipeline(transformer=transformer, vae=wan_vae(), scheduler=unipc(), **t5("umt5"))


def wan_video_to_video() -> Any:
    """Starts in the middle of the schedule."""
    return WanVideoToVideoPipeline(transformer=wan_transformer(), vae=wan_vae(), scheduler=unipc(), **t5("umt5"))


def lucy_edit() -> Any:
    """The edited video as further channels of the latent."""
    return LucyEditPipeline(
        transformer=wan_transformer(in_channels=4 + 4), vae=wan_vae(), scheduler=unipc(), **t5("umt5")
    )


def chrono_edit() -> Any:
    return ChronoEditPipeline(
        transformer=wan_transformer(ChronoEditTransformer3DModel, **SEES_PICTURES),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **t5("umt5"),
        **clip_vision(),
    )


def any_flow() -> Any:
    """The denoiser takes a step's end beside its start; frames before channels."""
    return AnyFlowPipeline(
        transformer=wan_transformer(AnyFlowTransformer3DModel),
        vae=wan_vae(),
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        **t5("umt5"),
    )


def helios() -> Any:
    """Earlier frames condition the next ones."""
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_dim": (4, 6, 6),
    }
    return HeliosPipeline(
        transformer=enliven(HeliosTransformer3DModel(**config)),
        vae=wan_vae(),
        scheduler=HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True),
        **t5("umt5"),
    )


HELIOS = SIZES | {"num_latent_frames_per_chunk": 3}

ZOO: dict[str, Specimen] = {
    "WanPipeline (2.2)": Specimen(wan_2_2, SIZES),
    "WanImageToVideoPipeline": Specimen(wan_image_to_video, SIZES, WITH_PICTURES),
    "WanPipeline (2.2, 5B)": Specimen(wan_2_2_small, SIZES),
    "WanVACEPipeline": Specimen(wan_vace, SIZES, WITH_VIDEOS),
    "WanVideoToVideoPipeline": Specimen(
        wan_video_to_video, {"height": 32, "width": 32, "max_sequence_length": 32}, WITH_VIDEOS
    ),
    "LucyEditPipeline": Specimen(lucy_edit, SIZES, WITH_VIDEOS),
    "ChronoEditPipeline": Specimen(chrono_edit, SIZES, WITH_PICTURES),
    "AnyFlowPipeline": Specimen(any_flow, SIZES),
    "HeliosPipeline": Specimen(helios, HELIOS),
    "HeliosPipeline (two chunks)": Specimen(helios, HELIOS | {"num_frames": 10}),
    "SkyReelsV2Pipeline": Specimen(skyreels, SIZES),
    "SkyReelsV2DiffusionForcingPipeline": Specimen(skyreels_diffusion_forcing, SIZES),
    "SkyReelsV2ImageToVideoPipeline": Specimen(skyreels_image_to_video, SIZES, WITH_PICTURES),
}
