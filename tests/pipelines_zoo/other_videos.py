"""Tiny pipelines that make videos: Cosmos, Sana Video, EasyAnimate, Motif Video."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderKLCosmos,
    AutoencoderKLMagvit,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DPMSolverMultistepScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from torch import nn

from tests.pipelines_zoo.checker import Approving
from tests.pipelines_zoo.encoders import gemma2
from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.video_encoders import qwen2_5_vl, qwen2_vl, t5gemma2
from tests.pipelines_zoo.wan_videos import SIZES, WITH_PICTURES, unipc, wan_vae
from tests.support.families import WIDTH, enliven, lively, t5


def cosmos_transformer(**changes: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "extra_pos_embed_type": "learnable",
        "concat_padding_mask": False,  # resizes it with torchvision
    }
    transformer = lively(CosmosTransformer3DModel(**config | changes))
    nn.init.normal_(transformer.proj_out.weight, std=5.0)  # its predictions are small beside noise of scale 80
    return enliven(transformer)


def cosmos() -> Any:
    """Preconditioned: the scheduler's input is computed from the prediction and the noisy latent."""
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = EDMEulerScheduler(sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    return CosmosTextToWorldPipeline(
        transformer=cosmos_transformer(), vae=vae.eval(), scheduler=scheduler, safety_checker=Approving(), **t5()
    )


def cosmos_2_from_picture() -> Any:
    """Each step replaces the known frames of the prediction."""
    return Cosmos2VideoToWorldPipeline(
        transformer=cosmos_transformer(in_channels=4 + 1),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Approving(),
        **t5(),
    )


def cosmos_2_5() -> Any:
    """The hidden states of every layer of the text encoder, concatenated."""
    return Cosmos2_5_PredictBasePipeline(
        transformer=cosmos_transformer(in_channels=4 + 1, text_embed_dim=2 * WIDTH),
        vae=wan_vae(),
        scheduler=unipc(),
        safety_checker=Approving(),
        **qwen2_5_vl("You are a helpful assistant who will provide prompts to an image generator."),
    )


def sana_video() -> Any:
    """Linear attention."""
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return SanaVideoPipeline(transformer=enliven(transformer), vae=wan_vae(), scheduler=scheduler, **gemma2())


def easy_animate() -> Any:
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        patch_size=2,
    )
    vae = AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return EasyAnimatePipeline(
        transformer=enliven(transformer), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **qwen2_vl()
    )


def motif_video() -> Any:
    """A guider as a component, of another kind than classifier-free guidance."""
    transformer = MotifVideoTransformer3DModel(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return MotifVideoPipeline(
        transformer=enliven(lively(transformer)),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=AdaptiveProjectedGuidance(),
        **t5gemma2(),
    )


ZOO: dict[str, Specimen] = {
    "CosmosTextToWorldPipeline": Specimen(cosmos, SIZES),
    "Cosmos2VideoToWorldPipeline": Specimen(cosmos_2_from_picture, SIZES, WITH_PICTURES),
    "Cosmos2_5_PredictBasePipeline": Specimen(cosmos_2_5, SIZES | {"max_sequence_length": 48}),
    "SanaVideoPipeline": Specimen(
        sana_video,
        {
            "height": 32,
            "width": 32,
            "frames": 5,
            "max_sequence_length": 32,
            "complex_human_instruction": [],
            "use_resolution_binning": False,
        },
    ),
    "EasyAnimatePipeline": Specimen(easy_animate, {"height": 32, "width": 32, "num_frames": 5, "negative_prompt": ""}),
    "MotifVideoPipeline": Specimen(motif_video, SIZES),
}
