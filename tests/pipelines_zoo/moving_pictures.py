"""Tiny pipelines that make a video from a picture, or from another video."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import (
    AnimateDiffVideoToVideoPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    Kandinsky5I2VPipeline,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.unets import ddim, motion
from tests.pipelines_zoo.video_encoders import llava, siglip_vision
from tests.pipelines_zoo.videos import (
    COGVIDEOX,
    HUNYUAN_VIDEO,
    KANDINSKY,
    LTX,
    cogvideox_transformer,
    cogvideox_vae,
    hunyuan_video,
    hunyuan_video_1_5,
    hunyuan_video_transformer,
    hunyuan_video_vae,
    kandinsky_5,
    ltx,
)
from tests.pipelines_zoo.wan_videos import WITH_PICTURES, WITH_VIDEOS
from tests.support.families import clip, t5, unet, vae


def hunyuan_video_from_picture(**changes: Any) -> Any:
    """The picture as tokens among the text's, and as channels of the latent."""
    pooled = clip(length=77)
    return HunyuanVideoImageToVideoPipeline(
        transformer=hunyuan_video_transformer(in_channels=4 + 4 + 1, image_condition_type="latent_concat", **changes),
        vae=hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        tokenizer_2=pooled["tokenizer"],
        text_encoder_2=pooled["text_encoder"],
        **llava(DEFAULT_PROMPT_TEMPLATE["template"], patches=24),
    )


def skyreels_from_picture() -> Any:
    return hunyuan_video(HunyuanSkyreelsImageToVideoPipeline, in_channels=4 + 4)


def hunyuan_video_1_5_from_picture() -> Any:
    pipeline = functools.partial(HunyuanVideo15ImageToVideoPipeline, **siglip_vision())
    return hunyuan_video_1_5(pipeline, task_type="i2v")


def kandinsky_5_from_picture() -> Any:
    return kandinsky_5(Kandinsky5I2VPipeline, visual_cond=True)


def cogvideox_from_picture() -> Any:
    """Rotary positions beside learned ones."""
    transformer = cogvideox_transformer(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4 + 4,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    return CogVideoXImageToVideoPipeline(
        transformer=transformer, vae=cogvideox_vae(), scheduler=CogVideoXDDIMScheduler(), **t5()
    )


def cogvideox_from_video() -> Any:
    """Starts in the middle of the schedule."""
    return CogVideoXVideoToVideoPipeline(
        transformer=cogvideox_transformer(), vae=cogvideox_vae(), scheduler=CogVideoXDDIMScheduler(), **t5()
    )


def ltx_from_picture() -> Any:
    """A timestep per token: the first frame has no noise, and its latents skip the scheduler."""
    return ltx(LTXImageToVideoPipeline)


def ltx_condition() -> Any:
    """Known tokens keep their own timestep; the scheduler receives all tokens."""
    return ltx(LTXConditionPipeline)


def animated_diffusion_from_video() -> Any:
    """Frames in the batch; starts in the middle of the schedule."""
    return AnimateDiffVideoToVideoPipeline(vae=vae(), unet=unet(), motion_adapter=motion(), scheduler=ddim(), **clip())


ZOO: dict[str, Specimen] = {
    "HunyuanVideo15ImageToVideoPipeline": Specimen(hunyuan_video_1_5_from_picture, {"num_frames": 5}, WITH_PICTURES),
    "Kandinsky5I2VPipeline": Specimen(kandinsky_5_from_picture, KANDINSKY | {"num_frames": 17}, WITH_PICTURES),
    "CogVideoXImageToVideoPipeline": Specimen(cogvideox_from_picture, COGVIDEOX, WITH_PICTURES),
    "CogVideoXVideoToVideoPipeline": Specimen(
        cogvideox_from_video, {"height": 32, "width": 32, "max_sequence_length": 32}, WITH_VIDEOS
    ),
    "LTXImageToVideoPipeline": Specimen(ltx_from_picture, LTX, WITH_PICTURES),
    "LTXConditionPipeline": Specimen(ltx_condition, LTX, WITH_PICTURES),
    "AnimateDiffVideoToVideoPipeline": Specimen(
        animated_diffusion_from_video, {"height": 32, "width": 32}, WITH_VIDEOS
    ),
    "HunyuanVideoImageToVideoPipeline": Specimen(hunyuan_video_from_picture, HUNYUAN_VIDEO, WITH_PICTURES),
    "HunyuanSkyreelsImageToVideoPipeline": Specimen(skyreels_from_picture, HUNYUAN_VIDEO, WITH_PICTURES),
}
