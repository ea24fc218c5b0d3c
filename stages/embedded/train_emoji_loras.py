"""Train two LoRAs of the embedded teacher `emoji`; run `train_emoji` first.

    python -m stages.embedded.train_emoji_loras

`emoji_grey_lora` is a style: it takes away most of the colour. `emoji_few_step_lora` samples in four steps: it learns
the teacher's own trajectories without guidance in four straight pieces (the idea of progressive distillation,
arXiv 2202.00512). Both are stock LoRAs (arXiv 2106.09685) of the transformer, in the format of `load_lora_weights`.
`training.json`, beside the weights, records the recipe and the losses. A run that was stopped goes on from its last
checkpoint in `cache_dir`; another seed needs another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import convert_state_dict_to_diffusers
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

from stages.base.loading import load_pipeline
from stages.embedded.emoji_recipe import HERE
from stages.embedded.emoji_vae import encode
from stages.embedded.noto_emoji import Emoji, load_emoji
from stages.embedded.train_emoji import Captions, draw, embed, flow_matching_loss, tokenize
from stages.embedded.training import Training

LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_out"),
]
FEW_STEPS = 4
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass
class Recipe:
    """The recipe."""

    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    rank: int = 8
    few_step_rank: int = 16
    trajectories: int = 4000
    steps_per_piece: int = 6
    cache_dir: str = "emoji_cache"
    output_dir: str = str(HERE)


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    emoji = load_emoji(Path(recipe.cache_dir))
    for train in (train_grey, train_few_step):
        torch.manual_seed(recipe.seed)
        train(emoji, recipe)


def train_grey(emoji: Emoji, recipe: Recipe) -> None:
    """Train the style LoRA on the pictures in greys, with their captions."""
    pipe = load_teacher(recipe)
    latents, captions = encode(pipe.vae, to_grey(emoji.images))[None], Captions(pipe.tokenizer, emoji)

    def loss_of_batch() -> Tensor:
        return flow_matching_loss(pipe, *draw(latents, captions, recipe.batch_size))

    train_lora(pipe, "emoji_grey_lora", recipe.rank, loss_of_batch, recipe)


def train_few_step(emoji: Emoji, recipe: Recipe) -> None:
    """Train the few-step LoRA: from each of four latents of a trajectory, one step to the next."""
    pipe = load_teacher(recipe)
    every = [caption for phrases in emoji.captions for caption in phrases]
    prompts = [every[i] for i in torch.randint(len(every), (recipe.trajectories,)).tolist()]
    tokens, (sigmas, path) = tokenize(pipe.tokenizer, prompts), trajectories(pipe, prompts, recipe)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(prompts), (recipe.batch_size,))
        piece = torch.randint(FEW_STEPS, (recipe.batch_size,))
        start, sigma = path[piece, chosen], sigmas[piece]
        slope = (path[piece + 1, chosen] - start) / (sigmas[piece + 1] - sigma)[:, None, None, None]
        prompt, pooled = embed(pipe, tokens[chosen], empty=1)
        velocity = pipe.transformer(start, prompt, pooled, 1000 * sigma).sample
        return functional.mse_loss(velocity, slope)

    train_lora(pipe, "emoji_few_step_lora", recipe.few_step_rank, loss_of_batch, recipe)


def load_teacher(recipe: Recipe) -> StableDiffusion3Pipeline:
    pipe = load_pipeline(str(Path(recipe.output_dir) / "emoji"))
    assert isinstance(pipe, StableDiffusion3Pipeline)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.requires_grad_(False)
    return pipe


def to_grey(images: Tensor) -> Tensor:
    """The luminance of images `[n, 3, h, w]`, in each of their three channels."""
    weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images).contiguous()


def trajectories(pipe: StableDiffusion3Pipeline, prompts: list[str], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Sample the teacher without guidance, with several steps in each of the few-step sampler's.

    Returns:
        the few-step sampler's sigmas `[5]` from 1 to 0, and the latents there `[5, n, 16, 8, 8]`.
    """
    pipe.scheduler.set_timesteps(FEW_STEPS)
    sigmas, each = pipe.scheduler.sigmas, recipe.steps_per_piece
    fine = np.interp(np.arange(FEW_STEPS * each) / each, np.arange(FEW_STEPS + 1), sigmas).tolist()
    batches = [prompts[i : i + 200] for i in range(0, len(prompts), 200)]
    return sigmas, torch.cat([latents_of(pipe, batch, fine, each) for batch in batches], dim=1)


def latents_of(pipe: StableDiffusion3Pipeline, prompts: list[str], sigmas: list[float], every: int) -> Tensor:
    """Sample without guidance; return the noise and the latents after each `every` steps, `[kept, n, 16, 8, 8]`."""
    kept = [torch.randn(len(prompts), pipe.transformer.config.in_channels, 8, 8)]

    def keep(_pipe: object, step: int, _timestep: object, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if (step + 1) % every == 0:
            kept.append(tensors["latents"].clone())
        return {}

    call = {"latents": kept[0], "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "latent"}
    pipe(prompts, sigmas=sigmas, num_inference_steps=len(sigmas), callback_on_step_end=keep, **call)
    return torch.stack(kept)


def train_lora(
    pipe: StableDiffusion3Pipeline, name: str, rank: int, loss_of_batch: Callable[[], Tensor], recipe: Recipe
) -> None:
    """Train a LoRA of the transformer and save it in its folder."""
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
    checkpoint = Path(recipe.cache_dir) / f"{name}.pt"
    training = Training(pipe.transformer, checkpoint, recipe.steps, recipe.learning_rate, decay=0.995)
    training.run(loss_of_batch)
    out = Path(recipe.output_dir) / name
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.transformer))
    halves = {key: weight.half() for key, weight in weights.items()}
    StableDiffusion3Pipeline.save_lora_weights(out, transformer_lora_layers=halves)
    used = {key: value for key, value in asdict(recipe).items() if key not in ("cache_dir", "output_dir")}
    summary = {"recipe": used, "parameters": sum(weight.numel() for weight in weights.values()), **training.summary()}
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
