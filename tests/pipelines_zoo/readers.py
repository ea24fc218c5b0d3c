"""Image transformers whose prompts are encoded by a vision-language model."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from torch import nn
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from tests.pipelines_zoo.encoders import (
    CHAT,
    CHAT_TOKENS,
    bytes_tokenizer,
    language_model_sizes,
    mistral3,
    qwen2_5_vl,
    qwen3,
    qwen3_vl,
)
from tests.pipelines_zoo.fluxes import flux2_vae
from tests.pipelines_zoo.images import SMALL, shifting, stirred
from tests.pipelines_zoo.specimen import Specimen
from tests.support.families import WIDTH, clip, qwen_image, vae


def ovis_image() -> Any:
    """Two calls per step on Flux's architecture, with gated feed-forward layers."""
    transformer = OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return OvisImagePipeline(transformer=stirred(transformer), vae=vae(4), scheduler=shifting(), **qwen3())


def longcat_parts() -> dict[str, Any]:
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
    )
    text = qwen2_5_vl(processor=True)
    text["text_processor"] = text.pop("processor")
    return {"transformer": stirred(transformer), "scheduler": shifting(), **text}


def longcat_image() -> Any:
    """Guidance that limits the norm, and an argument of the conditional call only."""
    return LongCatImagePipeline(vae=vae(16), **longcat_parts())


def flat_vae(channels: int, blocks: int) -> nn.Module:
    """Make a VAE without attention, which is slow on large images."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        shift_factor=0.0,
    ).eval()


def kandinsky5_parts(channels: int = 4, **changes: Any) -> dict[str, Any]:
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=channels,
        out_visual_dim=channels,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
        **changes,
    )
    text, two = qwen2_5_vl(processor=True), clip(length=77)
    return {
        "transformer": stirred(transformer),
        "vae": flat_vae(channels, 4),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "tokenizer": text["processor"],
        "text_encoder": text["text_encoder"],
        "tokenizer_2": two["tokenizer"],
        "text_encoder_2": two["text_encoder"],
    }


def kandinsky5() -> Any:
    """Channels last, and images of a million pixels only."""
    return Kandinsky5T2IPipeline(**kandinsky5_parts())


def krea2() -> Any:
    """Several layers of the text encoder, concatenated."""
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    text = qwen3_vl(Qwen3VLModel)
    del text["processor"]
    return Krea2Pipeline(
        transformer=stirred(transformer),
        vae=qwen_image().vae,
        scheduler=shifting(),
        text_encoder_select_layers=(0, 1, 2),
        **text,
    )


def nucleus_image() -> Any:
    """Experts, and cached keys of texts."""
    transformer = NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )
    text = qwen3_vl(layers=8)
    del text["tokenizer"]
    return NucleusMoEImagePipeline(transformer=stirred(transformer), vae=qwen_image().vae, scheduler=shifting(), **text)


def ideogram_transformer() -> nn.Module:
    transformer = Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=13 * WIDTH,
        mrope_section=(4, 2, 2),
    )
    return stirred(transformer)


def ideogram4() -> Any:
    """A separate denoiser for the unconditional pass, guidance at every scale, text and latent in one sequence."""
    text = qwen3_vl(Qwen3VLModel, layers=36)  # the pipeline takes 13 of them
    del text["processor"]
    return Ideogram4Pipeline(
        transformer=ideogram_transformer(),
        unconditional_transformer=ideogram_transformer(),
        vae=flux2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **text,
    )


def ernie_image() -> Any:
    """Text lengths in place of a mask."""
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 4, 8),
    )
    text = mistral3()
    text["text_encoder"] = text["text_encoder"].model
    return ErnieImagePipeline(
        transformer=stirred(transformer),
        vae=flux2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **text,
    )


def qwen_image_21() -> Any:
    """Text and latent in one sequence."""
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        mlp_ratio=2,
        axes_dims_rope=(4, 4, 8),
    )
    small = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        in_channels=3,
        out_channels=3,
    )
    text = qwen3_vl()
    del text["tokenizer"]
    return QwenImage21Pipeline(transformer=stirred(transformer), vae=small.eval(), scheduler=shifting(), **text)


def glm_reader() -> dict[str, Any]:
    """Make a model that writes an image in tokens of 32x32 pixels, from the seed of a call's first sample only."""
    tokenizer = bytes_tokenizer()
    tokens = {"image_token": "<|image|>", "grid_bos_token": "<|grid_bos|>", "grid_eos_token": "<|grid_eos|>"}
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*CHAT_TOKENS, *tokens.values()], "bos_token": "<|bos|>"}
    )
    tokenizer._set_model_specific_special_tokens(tokens)
    text = language_model_sizes(tokenizer) | {
        "vision_vocab_size": 128,
        "rope_parameters": {"mrope_section": [4, 2, 2], "rope_type": "default"},
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "image_size": 32, "patch_size": 8}
    config = GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config={"embed_dim": 32, "num_embeddings": 128, "latent_channels": 32},
    )
    return {
        "processor": GlmImageProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT),
        "vision_language_encoder": GlmImageForConditionalGeneration(config).eval(),
    }


def glm_image() -> Any:
    """Image tokens written beforehand, which the unconditional call omits, and text in quotes."""
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=128,
    )
    small = vae(4, 4)
    small.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    glyphs = T5Config(d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4, vocab_size=384)
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=T5EncoderModel(glyphs).eval(),
        vae=small,
        transformer=stirred(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **glm_reader(),
    )


QUOTED = ({"prompt": "a bold 'seven' leaning right"}, {"prompt": "a thin 'zero'"})

ZOO: dict[str, Specimen] = {
    "OvisImagePipeline": Specimen(ovis_image, {**SMALL, "max_sequence_length": 64}),
    "LongCatImagePipeline": Specimen(longcat_image, {**SMALL, "enable_prompt_rewrite": False}),
    "Kandinsky5T2IPipeline": Specimen(kandinsky5, {"max_sequence_length": 32}),
    "Krea2Pipeline": Specimen(krea2, {**SMALL, "max_sequence_length": 32}),
    "NucleusMoEImagePipeline": Specimen(nucleus_image, SMALL),
    "Ideogram4Pipeline": Specimen(ideogram4, {**SMALL, "max_sequence_length": 32, "guidance_schedule": None}),
    "ErnieImagePipeline": Specimen(ernie_image, SMALL),
    "QwenImage21Pipeline": Specimen(qwen_image_21, {"height": 64, "width": 64, "negative_prompt": " "}),
    "GlmImagePipeline": Specimen(glm_image, {**SMALL, "max_sequence_length": 16}, QUOTED),
}
