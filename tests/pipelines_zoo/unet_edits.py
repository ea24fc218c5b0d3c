"""Pipelines with a UNet, and Stable Diffusion 3, that edit a picture or start from one."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    PIAPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableVideoDiffusionPipeline,
    T2IAdapter,
    UNetSpatioTemporalConditionModel,
)
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from stages.base.sampling import Condition
from tests.pipelines_zoo.encoders import clip_vision
from tests.pipelines_zoo.pictures import mask, picture
from tests.pipelines_zoo.specimen import PROMPTS, Specimen
from tests.pipelines_zoo.unets import (
    SMALL,
    XL_UNET,
    ddim,
    motion,
    remade,
    stable_diffusion,
    stable_diffusion_xl,
)
from tests.support.families import WIDTH, clip, enliven, unet, vae


def pictured(**others: Any) -> tuple[Condition, ...]:
    """Add a picture to the prompts of every specimen, and its further conditions."""
    return tuple({**prompt, "image": picture(seed), **others} for seed, prompt in enumerate(PROMPTS))


def upscale() -> Any:
    """The noise level is a class, and the picture three channels."""
    return stable_diffusion(
        StableDiffusionUpscalePipeline,
        unet=unet(in_channels=7, num_class_embeds=100),
        low_res_scheduler=DDPMScheduler(),
        scheduler=ddim(prediction_type="v_prediction"),
    )


def depth_to_image() -> Any:
    """The picture's depth, from a separate network, is a fifth channel."""
    config = DPTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=(0, 1, 2, 3),
        neck_hidden_sizes=(8, 8, 8, 8),
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    return StableDiffusionDepth2ImgPipeline(
        vae=vae(),
        unet=unet(in_channels=5),
        scheduler=ddim(),
        depth_estimator=DPTForDepthEstimation(config).eval(),
        feature_extractor=DPTImageProcessor(size={"height": 32, "width": 32}),
        **clip(),
    )


def controlled() -> Any:
    control = ControlNetModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        conditioning_embedding_out_channels=(8, 8, 8),
    )
    return stable_diffusion(StableDiffusionControlNetPipeline, controlnet=enliven(control))


def adapted() -> Any:
    adapter = T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=4)
    denoiser = unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    return stable_diffusion(StableDiffusionAdapterPipeline, unet=denoiser, adapter=enliven(adapter))


def stable_video_diffusion() -> Any:
    """A picture and no prompt; a scale per frame, and none at the first."""
    denoiser = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=3 * 8,
        addition_time_embed_dim=8,
    )
    autoencoder = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    eye = clip_vision(WIDTH, 224, patch=56)  # the pipeline resizes to this size
    return StableVideoDiffusionPipeline(
        vae=autoencoder.eval(),
        image_encoder=eye["image_encoder"],
        unet=enliven(denoiser),
        scheduler=scheduler,
        feature_extractor=eye["image_processor"],
    )


def i2vgen() -> Any:
    denoiser = I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    eye = clip_vision(WIDTH)
    return I2VGenXLPipeline(
        vae=vae(),
        unet=enliven(denoiser),
        scheduler=ddim(),
        image_encoder=eye["image_encoder"],
        feature_extractor=eye["image_processor"],
        **clip(),
    )


def pia() -> Any:
    """The picture and its mask are five additional channels, with weights of the motion adapter."""
    adapter = motion(conv_in_channels=9)
    return PIAPipeline(vae=vae(), unet=unet(), motion_adapter=adapter, scheduler=ddim(), **clip())


ALL_STEPS = {"strength": 1.0}  # a lower strength skips the first steps
ZOO: dict[str, Specimen] = {
    "StableDiffusionInstructPix2PixPipeline": Specimen(
        lambda: stable_diffusion(StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8)),
        conditions=pictured(),
    ),
    "StableDiffusionXLInstructPix2PixPipeline": Specimen(
        lambda: stable_diffusion_xl(StableDiffusionXLInstructPix2PixPipeline, unet=unet(in_channels=8, **XL_UNET)),
        SMALL,
        pictured(),
    ),
    "StableDiffusionImg2ImgPipeline": Specimen(
        lambda: stable_diffusion(StableDiffusionImg2ImgPipeline), ALL_STEPS, pictured()
    ),
    "StableDiffusionInpaintPipeline": Specimen(
        lambda: stable_diffusion(StableDiffusionInpaintPipeline, unet=unet(in_channels=9)),
        SMALL,
        pictured(mask_image=mask()),
    ),
    "StableDiffusionUpscalePipeline": Specimen(upscale, conditions=pictured()),
    "StableDiffusionDepth2ImgPipeline": Specimen(depth_to_image, ALL_STEPS, pictured()),
    "StableDiffusionControlNetPipeline": Specimen(controlled, SMALL, pictured()),
    "StableDiffusionAdapterPipeline": Specimen(adapted, SMALL, pictured()),
    "StableVideoDiffusionPipeline": Specimen(
        stable_video_diffusion,
        {**SMALL, "num_frames": 2},
        tuple({"image": picture(seed)} for seed in range(2)),
    ),
    "I2VGenXLPipeline": Specimen(i2vgen, {**SMALL, "num_frames": 2, "clip_skip": None}, pictured()),
    "PIAPipeline": Specimen(pia, {**SMALL, "num_frames": 2}, pictured()),
    "StableDiffusionXLImg2ImgPipeline": Specimen(
        lambda: stable_diffusion_xl(StableDiffusionXLImg2ImgPipeline), ALL_STEPS, pictured()
    ),
    "StableDiffusion3Img2ImgPipeline": Specimen(
        lambda: remade(StableDiffusion3Img2ImgPipeline, "stable_diffusion_3"),
        {**SMALL, **ALL_STEPS, "max_sequence_length": 32},
        pictured(),
    ),
}
