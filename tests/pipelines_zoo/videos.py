"""Tiny pipelines that make videos."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

from tests.pipelines_zoo.encoders import gemma3, qwen2_5_vl_text
from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.video_encoders import chat_tokenizer, llama, qwen2_5_vl
from tests.support.families import WIDTH, clip, enliven, lively, t5


def hunyuan_video_transformer(**changes: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    return enliven(HunyuanVideoTransformer3DModel(**config | changes))


def hunyuan_video_vae() -> Any:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def hunyuan_video(pipeline: Any = HunyuanVideoPipeline, **changes: Any) -> Any:
    """True guidance by two calls beside an embedded one; the text passes through a refiner."""
    pooled = clip(length=77)
    return pipeline(
        transformer=hunyuan_video_transformer(**changes),
        vae=hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **llama(DEFAULT_PROMPT_TEMPLATE["template"]),
        tokenizer_2=pooled["tokenizer"],
        text_encoder_2=pooled["text_encoder"],
    )


HUNYUAN_VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "negative_prompt": ""}


def cogvideox_transformer(**changes: Any) -> Any:
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": 32,
    }
    return enliven(CogVideoXTransformer3DModel(**config | changes))


def cogvideox_vae() -> Any:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def cogvideox() -> Any:
    """Latents with frames before channels; text and video in one sequence."""
    return CogVideoXPipeline(
        transformer=cogvideox_transformer(), vae=cogvideox_vae(), scheduler=CogVideoXDDIMScheduler(), **t5()
    )


COGVIDEOX = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}


def ltx_transformer() -> Any:
    return enliven(
        LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=WIDTH,
        )
    )


def ltx_vae() -> Any:
    """Make a VAE whose latents are 4 times smaller than the frames, and 4 times fewer."""
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ).eval()


def ltx(pipeline: Any = LTXPipeline) -> Any:
    """Latents packed into tokens `[n, frames * height * width, channels]`."""
    return pipeline(transformer=ltx_transformer(), vae=ltx_vae(), scheduler=FlowMatchEulerDiscreteScheduler(), **t5())


LTX = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}


def ltx2_connectors() -> Any:
    heads = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=3,
        **{f"{modality}_connector_{name}": value for modality in ("video", "audio") for name, value in heads.items()},
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    ).eval()


def ltx2_parts() -> dict[str, Any]:
    """Make the decoders of video and sound."""
    video = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    sound = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return {"vae": video.eval(), "audio_vae": sound.eval(), "vocoder": vocoder.eval()}


def ltx2() -> Any:
    """Video and sound denoised together, each with its own scheduler: the second is a copy."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    return LTX2Pipeline(
        transformer=enliven(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        connectors=ltx2_connectors(),
        **ltx2_parts(),
        **gemma3(),
    )


LTX2 = LTX | {
    "num_frames": 5,
    "audio_guidance_scale": None,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "use_cross_timestep": False,
}


def mochi() -> Any:
    """The timestep counts upwards; one call with both halves."""
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        max_sequence_length=32,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        transformer=enliven(transformer), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **t5()
    )


def hunyuan_video_1_5(pipeline: Any, **changes: Any) -> Any:
    """Two encoders, for the whole prompt and for its words in quotation marks; a guider as a component."""
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        **changes,
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    letters = ByT5Tokenizer()
    config = T5Config(d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4, vocab_size=len(letters))
    pipe = pipeline(
        transformer=enliven(lively(transformer)),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        tokenizer=None,
        text_encoder=None,
        tokenizer_2=letters,
        text_encoder_2=T5EncoderModel(config).eval(),
        guider=ClassifierFreeGuidance(),
    )
    tokenizer = chat_tokenizer(pipe.system_message)
    text = lively(Qwen2_5_VLTextModel(qwen2_5_vl_text(tokenizer, num_hidden_layers=4)))
    pipe.register_modules(tokenizer=tokenizer, text_encoder=text)
    return pipe


def hunyuan_video_1_5_from_text() -> Any:
    return hunyuan_video_1_5(HunyuanVideo15Pipeline, task_type="t2v")


def kandinsky_5(pipeline: Any, **changes: Any) -> Any:
    """Channels last; the text is padded to the longest prompt of a call, without a mask."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        **changes,
    )
    pooled = clip(length=77)
    pipe = pipeline(
        transformer=enliven(transformer),
        vae=hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        tokenizer=None,
        text_encoder=None,
        tokenizer_2=pooled["tokenizer"],
        text_encoder_2=pooled["text_encoder"],
    )
    pipe.register_modules(**qwen2_5_vl(pipe.prompt_template[:400]))  # it cuts off 128 tokens, and fails with fewer
    return pipe


def kandinsky_5_video() -> Any:
    return kandinsky_5(Kandinsky5T2VPipeline)


KANDINSKY = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 128}

ZOO: dict[str, Specimen] = {
    "HunyuanVideoPipeline": Specimen(hunyuan_video, HUNYUAN_VIDEO),
    "CogVideoXPipeline": Specimen(cogvideox, COGVIDEOX),
    "LTXPipeline": Specimen(ltx, LTX),
    "LTX2Pipeline": Specimen(ltx2, LTX2),
    "LTX2Pipeline (perturbed, modalities apart)": Specimen(
        ltx2, LTX | {"num_frames": 5, "spatio_temporal_guidance_blocks": [1]}
    ),
    "HunyuanVideo15Pipeline": Specimen(hunyuan_video_1_5_from_text, {"height": 32, "width": 32, "num_frames": 5}),
    "Kandinsky5T2VPipeline": Specimen(kandinsky_5_video, KANDINSKY),
    "MochiPipeline": Specimen(mochi, {"height": 32, "width": 32, "num_frames": 7, "max_sequence_length": 32}),
}
