"""Pipelines of several stages, each with its own denoiser and scheduler."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import nn

from tests.pipelines_zoo.encoders import clip_vision
from tests.pipelines_zoo.specimen import Specimen
from tests.pipelines_zoo.unets import SMALL, ddim, movq, simple_unet
from tests.support.families import WIDTH, clip, enliven, unet, vae


def prior_transformer() -> PriorTransformer:
    """Makes an image embedding of a text, with guidance."""
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=2, num_embeddings=12
    )
    nn.init.ones_(prior.clip_std)
    return enliven(prior)


def unclip_scheduler(**changes: Any) -> UnCLIPScheduler:
    return UnCLIPScheduler(
        **{"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 10.0} | changes
    )


def kandinsky_2() -> Any:
    """A prior first makes an image embedding of the text, with a guidance scale of its own."""
    text, eye = clip(projection=True), clip_vision(WIDTH)
    return KandinskyV22CombinedPipeline(
        unet=simple_unet(addition_embed_type="image", encoder_hid_dim_type="image_proj"),
        scheduler=ddim(beta_schedule="linear"),
        movq=movq(),
        prior_prior=prior_transformer(),
        prior_image_encoder=eye["image_encoder"],
        prior_text_encoder=text["text_encoder"],
        prior_tokenizer=text["tokenizer"],
        prior_scheduler=unclip_scheduler(),
        prior_image_processor=eye["image_processor"],
    )


def kandinsky_2_prior() -> Any:
    """Embeddings `[n, width]` in place of latents, and sample prediction."""
    return KandinskyV22PriorPipeline(
        prior=prior_transformer(),
        scheduler=unclip_scheduler(),
        **clip(projection=True),
        **clip_vision(WIDTH),
    )


def stable_cascade_prior() -> Any:
    """The prior is guided; another pipeline decodes."""
    prior = StableCascadeUNet(
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=16,
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        switch_level=(False,),
    )
    return StableCascadePriorPipeline(
        prior=enliven(prior), scheduler=DDPMWuerstchenScheduler(), **clip(projection=True)
    )


def stable_unclip() -> Any:
    """The UNet takes an image embedding of the text as its class."""
    prior_text, text = clip(projection=True), clip()
    return StableUnCLIPPipeline(
        prior_tokenizer=prior_text["tokenizer"],
        prior_text_encoder=prior_text["text_encoder"],
        prior=prior_transformer(),
        prior_scheduler=DDPMScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            beta_schedule="squaredcos_cap_v2",
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        scheduler=ddim(prediction_type="v_prediction"),
        vae=vae(),
        **text,
    )


ZOO: dict[str, Specimen] = {
    "KandinskyV22CombinedPipeline": Specimen(kandinsky_2, {**SMALL, "prior_num_inference_steps": 2}),
    "KandinskyV22PriorPipeline": Specimen(kandinsky_2_prior),
    "StableCascadePriorPipeline": Specimen(stable_cascade_prior, {"height": 128, "width": 128}, shifted=False),
    "StableUnCLIPPipeline": Specimen(stable_unclip, {"prior_num_inference_steps": 2}),
}
