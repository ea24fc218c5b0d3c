"""Train a text-to-image teacher on Noto emoji with captions.

    python -m stages.embedded.train_emoji

A stock `StableDiffusion3Pipeline` without T5: this script trains the VAE, the tokenizer, and the two CLIP text encoders
together with the transformer. It needs `npm` once, for the pictures and the key words. A run that was stopped goes on
from its last checkpoint in `cache_dir`; another seed needs another one. `training.json`, next to the weights, records
the recipe and the results.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stages.base.loading import load_pipeline
from stages.base.pictures import grid
from stages.embedded.augmentation import mirror_some, transformed
from stages.embedded.emoji_recipe import LATENT_CHANNELS, Recipe
from stages.embedded.emoji_vae import encode, set_scaling_factor, train_decoder, train_vae
from stages.embedded.noto_emoji import Emoji, load_emoji, write_prompts, write_reference
from stages.embedded.training import Training

PROMPT_LENGTH = 16
NULL_PROBABILITY = 0.1
NAME_PROBABILITY = 0.5
SHOWN = [
    "grinning face",
    "smiling cat with heart eyes",
    "crying face",
    "smiling face with sunglasses",
    "dog face",
    "panda",
    "frog",
    "butterfly",
    "octopus",
    "rose",
    "cactus",
    "red apple",
    "pizza",
    "hamburger",
    "birthday cake",
    "rocket",
    "automobile",
    "house",
    "rainbow",
    "soccer ball",
    "guitar",
    "light bulb",
    "crown",
    "umbrella",
]


def new_tokenizer(captions: list[str], recipe: Recipe) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=recipe.vocabulary)
    tokenizer.model_max_length = PROMPT_LENGTH
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer, recipe: Recipe) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=2 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_pipeline(vae: AutoencoderKL, captions: list[str], recipe: Recipe) -> StableDiffusion3Pipeline:
    tokenizer = new_tokenizer(captions, recipe)
    width = 64 * recipe.heads
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=recipe.patch_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=recipe.layers,
        attention_head_dim=64,
        num_attention_heads=recipe.heads,
        joint_attention_dim=2 * recipe.text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * recipe.text_width,
        pos_embed_max_size=8 // recipe.patch_size,
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:  # adaLN-Zero of the DiT paper: every block starts as the identity
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=new_text_encoder(tokenizer, recipe),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer, recipe),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


class Captions:
    """Token ids of all captions; each draw takes one caption of each picture, or none."""

    def __init__(self, tokenizer: CLIPTokenizer, emoji: Emoji) -> None:
        counts = torch.tensor([len(phrases) for phrases in emoji.captions])
        self.counts, self.first = counts, counts.cumsum(0) - counts
        every = [caption for phrases in emoji.captions for caption in phrases]
        self.tokens = tokenize(tokenizer, every)
        self.null = tokenize(tokenizer, [""])

    def draw(self, chosen: Tensor) -> Tensor:
        """Token ids `[n, 16]`: half of them names, a tenth the empty caption, the others drawn evenly."""
        n = len(chosen)
        phrase = torch.where(torch.rand(n) < NAME_PROBABILITY, 0, (torch.rand(n) * self.counts[chosen]).long())
        return torch.where(torch.rand(n, 1) < NULL_PROBABILITY, self.null, self.tokens[self.first[chosen] + phrase])


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids `[n, 16]`, as in the pipeline."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def embed(pipe: StableDiffusion3Pipeline, tokens: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """Prompt embeddings `[n, 16 + empty, d]` and pooled ones `[n, d]`, as in the pipeline.

    Args:
        empty: number of zero tokens that the pipeline puts in the place of T5's.
    """
    encoded = [encoder(tokens, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    prompt = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
    pooled = torch.cat([output.text_embeds for output in encoded], dim=-1)
    return functional.pad(prompt, (0, 0, 0, empty)), pooled


def number_of_empty_tokens() -> int:
    """1 for most batches, and sometimes many, so that the pipeline's default of 256 does no harm."""
    return 1 if torch.rand(()) < 0.98 else int(torch.randint(2, 129, ()))


def train_denoiser(pipe: StableDiffusion3Pipeline, latents: Tensor, emoji: Emoji, recipe: Recipe) -> dict[str, Any]:
    """Train the transformer and the text encoders."""
    model = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).to(recipe.device)
    checkpoint = Path(recipe.cache_dir) / "denoiser.pt"
    training = Training(model, checkpoint, recipe.steps, recipe.learning_rate, decay=0.9995)
    captions = Captions(pipe.tokenizer, emoji)
    training.run(lambda: flow_matching_loss(pipe, *draw(latents, captions, recipe.batch_size)))
    return training.summary()


def draw(latents: Tensor, captions: Captions, size: int) -> tuple[Tensor, Tensor]:
    """A batch of latents `[b, 16, 8, 8]` from those of all copies `[copies, n, 16, 8, 8]`, and captions `[b, 16]`."""
    copy, chosen = (torch.randint(count, (size,)) for count in latents.shape[:2])
    return latents[copy, chosen], captions.draw(chosen)


def flow_matching_loss(pipe: StableDiffusion3Pipeline, clean: Tensor, tokens: Tensor) -> Tensor:
    """The squared error of the velocity at timesteps of a logit-normal density (arXiv 2403.03206, Eq. 2 and 19)."""
    device = pipe.transformer.device
    clean, noise = clean.to(device), torch.randn(clean.shape).to(device)
    sigma = compute_density_for_timestep_sampling("logit_normal", len(clean), 0.0, 1.0).to(device)
    prompt, pooled = embed(pipe, tokens.to(device), number_of_empty_tokens())
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = pipe.transformer(noisy, prompt, pooled, 1000 * sigma).sample
    return functional.mse_loss(velocity, noise - clean)


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    out = Path(recipe.output_dir)
    torch.manual_seed(recipe.seed)
    emoji = load_emoji(Path(recipe.cache_dir))
    vae, vae_training = train_vae(emoji, recipe)
    set_scaling_factor(vae, emoji.images)
    pipe = new_pipeline(vae, [caption for phrases in emoji.captions for caption in phrases], recipe)
    pictures = torch.stack(
        [transformed(mirror_some(emoji.images, emoji.can_be_mirrored)) for _ in range(recipe.copies)]
    )
    latents = torch.stack([encode(vae, copy) for copy in pictures])
    trainings = {
        "vae": vae_training,
        "denoiser": train_denoiser(pipe, latents, emoji, recipe),
        "decoder": train_decoder(vae, latents, pictures, recipe),
    }
    pipe.to(torch.float16).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(describe(pipe, recipe) | trainings, indent=2) + "\n")
    write_prompts(out, emoji)
    write_reference(out.with_name("noto_emoji"), emoji)
    draw_grid(load_pipeline(str(out)), out.with_name("emoji.png"), scale=4.0)


def draw_grid(pipe: StableDiffusion3Pipeline, path: Path, scale: float) -> None:
    """Write a picture of 24 prompts at a guidance scale."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(SHOWN))]
    pictures = pipe(SHOWN, guidance_scale=scale, num_inference_steps=25, max_sequence_length=1, generator=noise).images
    grid([pictures[:12], pictures[12:]]).save(path)


def describe(pipe: StableDiffusion3Pipeline, recipe: Recipe) -> dict[str, Any]:
    """The recipe, and the number of parameters of each part."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "recipe": {key: value for key, value in asdict(recipe).items() if key not in ("cache_dir", "output_dir")},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()},
    }


if __name__ == "__main__":
    main()
