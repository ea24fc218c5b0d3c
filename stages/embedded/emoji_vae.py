"""The VAE of the teacher that draws emoji."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from stages.embedded.augmentation import mirror_some
from stages.embedded.emoji_recipe import LATENT_CHANNELS, Recipe
from stages.embedded.noto_emoji import Emoji
from stages.embedded.training import Training

DECODED_NOISE = 0.05  # of latents with a deviation of 1: the denoiser's are not perfect either


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
    )


def edges(images: Tensor) -> Iterator[Tensor]:
    yield images[..., 1:] - images[..., :-1]
    yield images[..., 1:, :] - images[..., :-1, :]


def reconstruction_error(decoded: Tensor, images: Tensor) -> Tensor:
    """The error of pixels, absolute and squared, and the absolute error of edges."""
    error = functional.l1_loss(decoded, images) + functional.mse_loss(decoded, images)
    for ours, theirs in zip(edges(decoded), edges(images), strict=True):
        error = error + functional.l1_loss(ours, theirs)
    return error


def train_vae(emoji: Emoji, recipe: Recipe) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Train a VAE on the pictures and mirror images, with a weak prior on the latents."""
    vae = new_vae().to(recipe.device)
    checkpoint = Path(recipe.cache_dir) / "vae.pt"
    training = Training(vae, checkpoint, recipe.vae_steps, recipe.vae_learning_rate, decay=0.999)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(emoji), (recipe.vae_batch_size,))
        images = mirror_some(emoji.images[chosen], emoji.can_be_mirrored[chosen]).to(recipe.device)
        with torch.autocast(recipe.device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return reconstruction_error(decoded.float(), images) + 1e-6 * posterior.kl().mean()

    training.run(loss_of_batch)
    return vae, training.summary()


def train_decoder(vae: AutoencoderKL, latents: Tensor, pictures: Tensor, recipe: Recipe) -> dict[str, Any]:
    """Train the decoder further for the same latents, so that a denoiser that was trained on them stays valid.

    Args:
        latents: of the pictures, `[copies, n, 16, 8, 8]`; pictures: `[copies, n, 3, 64, 64]`.
    """
    model = nn.ModuleList([vae.post_quant_conv, vae.decoder]).to(recipe.device)
    checkpoint = Path(recipe.cache_dir) / "decoder.pt"
    training = Training(model, checkpoint, recipe.decoder_steps, recipe.vae_learning_rate, decay=0.999)

    def loss_of_batch() -> Tensor:
        copy, chosen = (torch.randint(count, (recipe.vae_batch_size,)) for count in latents.shape[:2])
        noisy = latents[copy, chosen] + DECODED_NOISE * torch.randn(recipe.vae_batch_size, LATENT_CHANNELS, 8, 8)
        with torch.autocast(recipe.device, torch.bfloat16):
            scaled = noisy.to(recipe.device) / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(scaled).sample
        return reconstruction_error(decoded.float(), pictures[copy, chosen].to(recipe.device))

    training.run(loss_of_batch)
    return training.summary()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents `[n, 16, 8, 8]` of images `[n, 3, 64, 64]`, times the scaling factor."""
    found = [vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in images.split(100)]
    return (torch.cat(found) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def set_scaling_factor(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the VAE's shift and scaling factor so that these images' latents have a mean of 0 and a deviation of 1."""
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = encode(vae, images)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
