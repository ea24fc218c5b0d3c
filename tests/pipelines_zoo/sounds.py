"""Tiny pipelines that make music and other sounds."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3DiTModel,
    StableAudio3Pipeline,
)
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.ace_step.pipeline_ace_step import DEFAULT_DIT_INSTRUCTION, SFT_GEN_PROMPT
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from torch import nn
from transformers import Qwen3Config, Qwen3Model, T5GemmaConfig, T5GemmaEncoderModel

from tests.pipelines_zoo.encoders import bytes_tokenizer, language_model, language_model_sizes
from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.video_encoders import chat_tokenizer
from tests.support.families import WIDTH, enliven, lively, t5

TEMPLATE = (
    SFT_GEN_PROMPT + DEFAULT_DIT_INSTRUCTION + "- bpm: N/A - timesignature: N/A - keyscale: N/A - duration: seconds"
)


def ace_step() -> Any:
    """Adaptive projected guidance with its own momentum, against a learned embedding; timesteps from 1 to 0."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "sliding_window": 16}
    transformer = AceStepTransformer1DModel(
        **sizes, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2
    )
    for layer in transformer.layers:
        nn.init.normal_(layer.cross_attn.to_out[0].weight, std=1.0)  # it averages over a template's many tokens
    encoder = AceStepConditionEncoder(
        **sizes,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    return AceStepPipeline(
        transformer=enliven(transformer),
        condition_encoder=enliven(lively(encoder)),
        vae=AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=8,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        **language_model(Qwen3Model, Qwen3Config, chat_tokenizer(TEMPLATE)),
    )


def longcat_audio() -> Any:
    transformer = LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    vae = LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16, downsampling_ratio=2
    )
    return LongCatAudioDiTPipeline(
        transformer=enliven(lively(transformer)),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        **t5("umt5"),
    )


def stable_audio_3() -> Any:
    """The duration is a condition too; timesteps from 1 to 0."""
    transformer = StableAudio3DiTModel(
        io_channels=8,
        patch_size=1,
        embed_dim=32,
        depth=2,
        num_heads=4,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    vae = AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    tokenizer = bytes_tokenizer(start=True)
    text = language_model_sizes(tokenizer) | {"layer_types": ["full_attention"] * 2}
    config = T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False)
    return StableAudio3Pipeline(
        transformer=enliven(lively(transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        vae=vae.eval(),
        tokenizer=tokenizer,
        text_encoder=lively(T5GemmaEncoderModel(config)),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16).eval(),
    )


ZOO: dict[str, Specimen] = {
    "AceStepPipeline": Specimen(ace_step, {"audio_duration": 4.0}),
    "LongCatAudioDiTPipeline": Specimen(longcat_audio, {"audio_duration_s": 0.002}),
    "StableAudio3Pipeline": Specimen(stable_audio_3, {"duration": 1.0}),
}
