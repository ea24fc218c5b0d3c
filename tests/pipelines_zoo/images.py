"""Transformers that make images from text, beyond those of `tests/support/families.py`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AmusedPipeline,
    AmusedScheduler,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLHunyuanImage,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ConfigMixin,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    ModelMixin,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UVit2DModel,
    VQModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

from tests.pipelines_zoo.encoders import bytes_tokenizer, gemma, gemma2, glm, language_model, qwen2_5_vl, qwen3
from tests.pipelines_zoo.specimen import Specimen
from tests.support.families import WIDTH, clip, enliven, lively, stable_diffusion_3, t5, vae, wan

SMALL = {"height": 32, "width": 32}
SHORT = {"max_sequence_length": 32}


def stirred(denoiser: nn.Module) -> nn.Module:
    """Enlarge all weights, where the stock ones make the condition too weak beside the latent."""
    return enliven(lively(denoiser))


def shifting() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def lumina2() -> Any:
    """The scheduler receives the negated prediction, and time runs from 0 to 1."""
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=stirred(transformer), vae=vae(4, 4), scheduler=FlowMatchEulerDiscreteScheduler(), **gemma2()
    )


def z_image_transformer() -> nn.Module:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=(8, 4, 4),
        axes_lens=(256, 32, 32),
    )
    return enliven(transformer)


def z_image() -> Any:
    """Lists of latents and of texts, the negated prediction, and a scale of 0 for no guidance."""
    return ZImagePipeline(
        transformer=z_image_transformer(), vae=vae(16, 2), scheduler=FlowMatchEulerDiscreteScheduler(), **qwen3()
    )


def sana_parts(**changes: Any) -> dict[str, Any]:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
        **changes,
    )
    return {
        "transformer": enliven(transformer),
        "vae": small_dc(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        **gemma2(),
    }


def small_dc() -> nn.Module:
    """Make an autoencoder whose latents are twice smaller than the images."""
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()


def sana() -> Any:
    """Linear attention, and convolutional feed-forward layers."""
    return SanaPipeline(**sana_parts())


def cogview4() -> Any:
    """Texts padded to the longest, without a mask, and two calls per step."""
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(transformer=stirred(transformer), vae=vae(), scheduler=scheduler, **glm())


def aura_flow() -> Any:
    """An attention class of its own, and time as a fraction."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        transformer=stirred(transformer), vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), **t5("umt5")
    )


def hidream() -> Any:
    """Four text encoders, layers of one of them before the batch, and experts.

    All images have one area, hence large patches.
    """
    one, two, three = clip(projection=True, length=32), clip(projection=True, length=32), t5()
    four = language_model(LlamaForCausalLM, LlamaConfig, bytes_tokenizer(start=True), attn_implementation="eager")
    transformer = HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=(WIDTH, WIDTH),
        text_emb_dim=2 * WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128),
        llama_layers=(0, 1, 1, 1),
    )
    return HiDreamImagePipeline(
        transformer=stirred(transformer),
        vae=vae(4, 1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **one,
        tokenizer_2=two["tokenizer"],
        text_encoder_2=two["text_encoder"],
        tokenizer_3=three["tokenizer"],
        text_encoder_3=three["text_encoder"],
        tokenizer_4=four["tokenizer"],
        text_encoder_4=four["text_encoder"],
    )


def hunyuan_image() -> Any:
    """A guider as a component, and another one for prompts that quote a text."""
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    small = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=4,
        sample_size=32,
    )
    glyphs = T5Config(d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4, vocab_size=384)
    return HunyuanImagePipeline(
        transformer=stirred(transformer),
        vae=small.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        **qwen2_5_vl(),
        tokenizer_2=ByT5Tokenizer(),
        text_encoder_2=T5EncoderModel(glyphs).eval(),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    )


def lumina() -> Any:
    """Guidance on three of four channels, a learned variance, and the conditional half first."""
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=WIDTH,
    )
    return LuminaPipeline(
        transformer=stirred(transformer), vae=vae(4, 4), scheduler=FlowMatchEulerDiscreteScheduler(), **gemma()
    )


def cogview3_plus() -> Any:
    """Velocities on a schedule with zero terminal SNR."""
    transformer = CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return CogView3PlusPipeline(transformer=stirred(transformer), vae=vae(), scheduler=scheduler, **t5())


def sana_pag() -> Any:
    """A third part of the batch with perturbed attention."""
    return SanaPAGPipeline(**sana_parts())


class Guard(ModelMixin, ConfigMixin):
    """Approves everything, in place of a safety checker from a package that is not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos2() -> Any:
    """A preconditioned prediction, on noise scales up to 80."""
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # resizes it with torchvision
    )
    return Cosmos2TextToImagePipeline(
        transformer=stirred(transformer),
        vae=wan().vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Guard(),
        **t5(),
    )


def sana_sprint() -> Any:
    """Embedded guidance only, on a schedule of angles."""
    return SanaSprintPipeline(
        **sana_parts(guidance_embeds=True, guidance_embeds_scale=10.0, qk_norm="rms_norm_across_heads")
        | {"scheduler": SCMScheduler()}
    )


def stable_diffusion_35() -> Any:
    """As SD 3.5: normalised queries and keys, and a second attention on the latent only in the first block."""
    parts = stable_diffusion_3().components
    config = dict(parts["transformer"].config) | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    return StableDiffusion3Pipeline(**parts | {"transformer": enliven(SD3Transformer2DModel.from_config(config))})


def amused() -> Any:
    """Masked tokens of an image are predicted; no latent is denoised."""
    transformer = UVit2DModel(
        hidden_size=16,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=32,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=2,
        num_attention_heads=1,
        attention_dropout=0.0,
        intermediate_size=16,
        layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )
    vqvae = VQModel(
        act_fn="silu",
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        in_channels=3,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        num_vq_embeddings=32,
        out_channels=3,
        sample_size=8,
        up_block_types=["UpDecoderBlock2D"],
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return AmusedPipeline(
        vqvae=vqvae.eval(),
        transformer=stirred(transformer),
        scheduler=AmusedScheduler(mask_token_id=31),
        **clip(projection=True),
    )


ZOO: dict[str, Specimen] = {
    "Lumina2Pipeline": Specimen(lumina2, {**SMALL, **SHORT, "system_prompt": "Draw"}),
    "ZImagePipeline": Specimen(z_image, {**SMALL, **SHORT}),
    "SanaPipeline": Specimen(
        sana,
        {**SMALL, **SHORT, "complex_human_instruction": None, "use_resolution_binning": False},
    ),
    "CogView4Pipeline": Specimen(cogview4, {**SMALL, **SHORT}),
    "AuraFlowPipeline": Specimen(aura_flow, {**SMALL, **SHORT}),
    "HiDreamImagePipeline": Specimen(hidream, {**SHORT}),
    "HunyuanImagePipeline": Specimen(hunyuan_image, SMALL),
    "LuminaPipeline": Specimen(lumina, {"height": 64, "width": 64, "clean_caption": False}),
    "CogView3PlusPipeline": Specimen(cogview3_plus, {**SMALL, **SHORT}),
    "SanaPAGPipeline": Specimen(
        sana_pag, {**SMALL, **SHORT, "complex_human_instruction": None, "use_resolution_binning": False}
    ),
    "Cosmos2TextToImagePipeline": Specimen(cosmos2, {**SMALL, **SHORT}),
    "SanaSprintPipeline": Specimen(
        sana_sprint,
        {
            **SMALL,
            **SHORT,
            "intermediate_timesteps": None,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
    ),
    "StableDiffusion3Pipeline (3.5)": Specimen(stable_diffusion_35, {**SMALL, **SHORT}),
    "AmusedPipeline": Specimen(amused, {"height": 8, "width": 8}, shifted=False),
}
