"""Train two LoRAs of the embedded teacher `emoji`; run `train_emoji` first.

    python -m stages.embedded.train_emoji_loras

`emoji_grey_lora` is a style: it draws in greys. `emoji_few_step_lora` samples in four steps: it learns the teacher's own
trajectories without guidance in four straight pieces (the idea of progressive distillation, arXiv 2202.00512). Both are
stock LoRAs (arXiv 2106.09685) of the transformer's attention, in the format of `load_lora_weights`. `training.json`,
next to the weights, records the recipe and the results.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import convert_state_dict_to_diffusers
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional
from tqdm import trange

from stages.embedded.emoji import Emoji, load_emoji
from stages.embedded.train_emoji import HERE, Captions, draw, embed, encode, flow_matching_loss
from stages.embedded.training import Training

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEW_STEPS = 4
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass
class Recipe:
    """The recipe; its defaults trained the embedded weights."""

    seed: int = 0
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    rank: int = 16
    few_step_rank: int = 64
    trajectories: int = 8000
    steps_per_piece: int = 8
    cache_dir: str = "emoji_cache"
    output_dir: str = str(HERE)


def to_grey(images: Tensor) -> Tensor:
    """The luminance of images `[n, 3, h, w]`, in each of their three channels."""
    weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images).contiguous()


def load_teacher() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(HERE / "emoji", torch_dtype=torch.float32)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.requires_grad_(False)
    return pipe


def train_lora(
    pipe: StableDiffusion3Pipeline, name: str, rank: int, loss_of_batch: Callable[[], Tensor], recipe: Recipe
) -> None:
    """Train a LoRA of the transformer and save it in its folder."""
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS))
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


def train_grey(emoji: Emoji, recipe: Recipe) -> None:
    """Train the style LoRA on the pictures in greys, with their captions."""
    pipe = load_teacher()
    latents, captions = encode(pipe.vae, to_grey(emoji.images)), Captions(pipe.tokenizer, emoji)

    def loss_of_batch() -> Tensor:
        return flow_matching_loss(pipe, *draw(latents, emoji, captions, recipe.batch_size))

    train_lora(pipe, "emoji_grey_lora", recipe.rank, loss_of_batch, recipe)


@torch.no_grad()
def trajectories(pipe: StableDiffusion3Pipeline, captions: Captions, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the teacher without guidance by Euler steps.

    Returns:
        the scheduler's sigmas `[5]` from 1 to 0, the latents there `[5, n, 16, 8, 8]`, and the captions `[n, 16]`.
    """
    pipe.scheduler.set_timesteps(FEW_STEPS)
    sigmas = pipe.scheduler.sigmas
    tokens = captions.draw(torch.randint(len(captions), (recipe.trajectories,)))
    paths = []
    for i in trange(0, len(tokens), 200, desc="trajectories"):
        prompt, pooled = embed(pipe, tokens[i : i + 200], empty=1)
        latents = torch.randn(len(prompt), pipe.transformer.config.in_channels, 8, 8)
        path = [latents]
        for start, end in itertools.pairwise(sigmas.tolist()):
            for sigma, following in itertools.pairwise(torch.linspace(start, end, recipe.steps_per_piece + 1)):
                velocity = pipe.transformer(latents, prompt, pooled, 1000 * sigma.expand(len(latents))).sample
                latents = latents + (following - sigma) * velocity
            path.append(latents)
        paths.append(torch.stack(path))
    return sigmas, torch.cat(paths, dim=1), tokens


def train_few_step(emoji: Emoji, recipe: Recipe) -> None:
    """Train the few-step LoRA: from each of four latents of a trajectory, one step to the next."""
    pipe = load_teacher()
    sigmas, paths, tokens = trajectories(pipe, Captions(pipe.tokenizer, emoji), recipe)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(tokens), (recipe.batch_size,))
        piece = torch.randint(FEW_STEPS, (recipe.batch_size,))
        start, sigma = paths[piece, chosen], sigmas[piece]
        slope = (paths[piece + 1, chosen] - start) / (sigmas[piece + 1] - sigma)[:, None, None, None]
        prompt, pooled = embed(pipe, tokens[chosen], empty=1)
        velocity = pipe.transformer(start, prompt, pooled, 1000 * sigma).sample
        return functional.mse_loss(velocity, slope)

    train_lora(pipe, "emoji_few_step_lora", recipe.few_step_rank, loss_of_batch, recipe)


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    emoji = load_emoji(Path(recipe.cache_dir))
    for train in (train_grey, train_few_step):
        torch.manual_seed(recipe.seed)
        train(emoji, recipe)


if __name__ == "__main__":
    main()
