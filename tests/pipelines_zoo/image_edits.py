"""Pipelines that edit a picture, or start from one."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    ChromaImg2ImgPipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    Kandinsky5I2IPipeline,
    LongCatImageEditPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
    ZImageImg2ImgPipeline,
)
from torch import nn

from tests.pipelines_zoo.encoders import qwen2_5_vl, qwen3_vl
from tests.pipelines_zoo.fluxes import flux_parts
from tests.pipelines_zoo.images import SHORT, SMALL, shifting, stirred, z_image
from tests.pipelines_zoo.pictures import picture
from tests.pipelines_zoo.readers import flat_vae, kandinsky5_parts, longcat_parts
from tests.pipelines_zoo.specimen import Specimen
from tests.support.families import PROMPTS, WIDTH, chroma, qwen_image

PICTURED = tuple({"prompt": prompt, "image": picture(place)} for place, prompt in enumerate(PROMPTS))
LONG = tuple(asked | {"prompt": f"{asked['prompt']}, " * 12} for asked in PICTURED)  # beside a long template


def flux_kontext() -> Any:
    """The picture's tokens follow the latent's, and are cut from the prediction."""
    return FluxKontextPipeline(**flux_parts())


def flux_from_picture() -> Any:
    return FluxImg2ImgPipeline(**flux_parts())


def chroma_from_picture() -> Any:
    return ChromaImg2ImgPipeline(**chroma().components)


def z_image_from_picture() -> Any:
    return ZImageImg2ImgPipeline(**z_image().components)


def qwen_image_from_picture() -> Any:
    return QwenImageImg2ImgPipeline(**qwen_image().components | {"transformer": qwen_transformer()} | qwen2_5_vl())


def qwen_transformer(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (8, 4, 4),
    }
    return stirred(QwenImageTransformer2DModel(**config | changes))


def deep_vae(doublings: int = 5, in_channels: int = 3) -> nn.Module:
    """Make a VAE whose latents are 2^doublings smaller than the images.

    Pipelines that edit scale every picture to 1024x1024.
    """
    return AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        input_channels=in_channels,
        dim_mult=[1] * (doublings + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * doublings,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def qwen_edit_parts() -> dict[str, Any]:
    return {
        "transformer": qwen_transformer(),
        "vae": deep_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **qwen2_5_vl(processor=True),
    }


def qwen_image_edit() -> Any:
    """A text encoder that reads the picture too."""
    return QwenImageEditPipeline(**qwen_edit_parts())


def qwen_image_edit_plus() -> Any:
    """Several pictures for one prompt, and one prompt per call."""
    return QwenImageEditPlusPipeline(**qwen_edit_parts())


def qwen_image_layered() -> Any:
    """An image with transparency, split into layers."""
    parts = qwen_edit_parts() | {
        "transformer": qwen_transformer(use_additional_t_cond=True, use_layer3d_rope=True),
        "vae": deep_vae(),
    }
    return QwenImageLayeredPipeline(**parts)


def longcat_image_edit() -> Any:
    return LongCatImageEditPipeline(vae=flat_vae(16, 6), **longcat_parts())


def kandinsky5_from_picture() -> Any:
    """The picture in additional channels beside the latent, which is denoised in place."""
    return Kandinsky5I2IPipeline(**kandinsky5_parts(visual_cond=True))


def joyimage_edit() -> Any:
    """The picture is a frame before the latent's; the target includes both."""
    transformer = JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
        theta=256,
    )
    deep = AutoencoderKLWan(
        base_dim=2,
        z_dim=4,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False] * 3,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=32,
    )
    return JoyImageEditPipeline(
        transformer=stirred(transformer),
        vae=deep.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        **qwen3_vl(),
    )


def dreamlite() -> Any:
    """A latent beside an empty one, a mask, guidance at every scale, one prompt per call."""
    unet = DreamLiteUNetModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=1,
    )
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    return DreamLitePipeline(unet=stirred(unet), vae=small.eval(), scheduler=shifting(), **qwen3_vl())


ZOO: dict[str, Specimen] = {
    "FluxKontextPipeline": Specimen(
        flux_kontext,
        {**SMALL, **SHORT, "negative_prompt": "", "max_area": 32 * 32, "_auto_resize": False},
        PICTURED,
    ),
    "FluxImg2ImgPipeline": Specimen(
        flux_from_picture, {**SMALL, **SHORT, "negative_prompt": "", "strength": 1.0}, PICTURED
    ),
    "ChromaImg2ImgPipeline": Specimen(chroma_from_picture, {**SMALL, **SHORT, "strength": 1.0}, PICTURED),
    "ZImageImg2ImgPipeline": Specimen(z_image_from_picture, {**SMALL, **SHORT, "strength": 1.0}, PICTURED),
    "QwenImageImg2ImgPipeline": Specimen(
        qwen_image_from_picture, {**SMALL, "negative_prompt": " ", "strength": 1.0}, PICTURED
    ),
    "QwenImageEditPipeline": Specimen(qwen_image_edit, {"height": 128, "width": 128, "negative_prompt": " "}, PICTURED),
    "QwenImageEditPlusPipeline": Specimen(
        qwen_image_edit_plus, {"height": 128, "width": 128, "negative_prompt": " "}, PICTURED
    ),
    "QwenImageLayeredPipeline": Specimen(
        qwen_image_layered, {"resolution": 640, "layers": 1, "negative_prompt": " "}, LONG
    ),
    "LongCatImageEditPipeline": Specimen(longcat_image_edit, {}, LONG),
    "Kandinsky5I2IPipeline": Specimen(kandinsky5_from_picture, {"max_sequence_length": 512}, PICTURED),
    "JoyImageEditPipeline": Specimen(joyimage_edit, {}, PICTURED),
    "DreamLitePipeline": Specimen(dreamlite, {**SMALL, "max_sequence_length": 64}),
}
