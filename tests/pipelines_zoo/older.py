"""Older transformers, and sound."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderOobleck,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMDPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from tests.pipelines_zoo.encoders import bert
from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.unets import SMALL, ddim
from tests.support.families import WIDTH, enliven, lively, t5, trained, vae


def hunyuan_dit(kind: type, **changes: Any) -> Any:
    """Two texts with a mask each, sizes per sample, rotary tables, and a variance beside the prediction."""
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        hidden_size=24,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
    )
    two = t5()
    return kind(
        transformer=enliven(transformer),
        vae=vae(blocks=4),  # the rotary table assumes eight
        scheduler=DDPMScheduler(),
        tokenizer_2=two["tokenizer"],
        text_encoder_2=two["text_encoder"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **bert(),
        **changes,
    )


def latte() -> Any:
    """Frames move into the batch and out of it, from block to block."""
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    return LattePipeline(transformer=enliven(transformer), vae=vae(), scheduler=ddim(), **t5())


def allegro() -> Any:
    """Rotary tables as nested tuples of tensors."""
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    autoencoder = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    autoencoder.enable_tiling()
    return AllegroPipeline(transformer=enliven(transformer), vae=autoencoder.eval(), scheduler=ddim(), **t5())


def stable_audio() -> Any:
    """Sound: latents `[n, channels, length]`, times in place of sizes, and fractional timesteps."""
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=WIDTH,
        time_proj_dim=8,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    autoencoder = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    text = t5()
    text["tokenizer"].model_max_length = 12
    return StableAudioPipeline(
        transformer=enliven(transformer),
        vae=autoencoder.eval(),
        scheduler=EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
        ).eval(),
        **text,
    )


def audio_ldm_2() -> Any:
    """Sound: two texts, one of them extended by a language model, and a vocoder after the decoder."""
    tokenizer = trained(RobertaTokenizer)
    tokenizer.model_max_length = 32
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    hearing = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    clap = ClapConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "pad_token_id": 1}, audio_config=hearing, projection_dim=16
    )
    denoiser = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, WIDTH),) * 2,  # itself, and two texts
        attention_head_dim=2,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    language = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=100, n_positions=99, bos_token_id=0, eos_token_id=0)
    )
    language.config.max_new_tokens = 8
    two = t5()
    two["tokenizer"].model_max_length = 32
    return AudioLDM2Pipeline(
        vae=AutoencoderKL.from_config(vae(blocks=2).config, in_channels=1, out_channels=1).eval(),
        text_encoder=lively(ClapModel(clap)),
        text_encoder_2=two["text_encoder"],
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=WIDTH, langauge_model_dim=16
        ).eval(),
        language_model=lively(language),
        tokenizer=tokenizer,
        tokenizer_2=two["tokenizer"],
        feature_extractor=ClapFeatureExtractor(),
        unet=enliven(denoiser),
        scheduler=ddim(beta_schedule="scaled_linear"),
        vocoder=SpeechT5HifiGan(vocoder).eval(),
    )


def dit() -> Any:
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    labels = {0: "zero", 1: "one"}
    return DiTPipeline(transformer=enliven(transformer), vae=vae(), scheduler=ddim(), id2label=labels)


HUNYUAN = {"height": 64, "width": 64, "use_resolution_binning": False}
ZOO: dict[str, Specimen] = {
    "HunyuanDiTPipeline": Specimen(lambda: hunyuan_dit(HunyuanDiTPipeline), HUNYUAN),
    "HunyuanDiTPAGPipeline": Specimen(
        lambda: hunyuan_dit(HunyuanDiTPAGPipeline, pag_applied_layers="blocks.1"), HUNYUAN
    ),
    "LattePipeline": Specimen(latte, {**SMALL, "video_length": 2, "clean_caption": False}),
    "AllegroPipeline": Specimen(allegro, {**SMALL, "num_frames": 8, "max_sequence_length": 32, "clean_caption": False}),
    "StableAudioPipeline": Specimen(stable_audio, {"audio_end_in_s": 2.0}),
    "AudioLDM2Pipeline": Specimen(audio_ldm_2, {"audio_length_in_s": 0.05}),
    "DiTPipeline": Specimen(dit, {}, ({"class_label": 3}, {"class_label": 7})),
}
