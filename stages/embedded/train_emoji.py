"""Train a text-to-image teacher on Noto emoji with captions.

    python -m stages.embedded.train_emoji

A stock `StableDiffusion3Pipeline` without T5: this script trains the VAE, the tokenizer, and the two CLIP text encoders
together with the transformer. It needs `npm` once, for the pictures and the key words. A run that was stopped goes on
from its last checkpoint. `training.json`, next to the weights, records the recipe and the results.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stages.base.pictures import grid, to_picture
from stages.embedded.emoji import Emoji, load_emoji
from stages.embedded.training import Training

HERE = Path(__file__).parent
LATENT_CHANNELS = 16
DECODED_NOISE = 0.05  # of latents with a deviation of 1: the denoiser's are not perfect either
PROMPT_LENGTH = 16
NULL_PROBABILITY = 0.1
NAME_PROBABILITY = 0.5


@dataclass
class Recipe:
    """The recipe."""

    seed: int = 0
    vae_steps: int = 3500
    vae_batch_size: int = 16
    vae_learning_rate: float = 1.5e-3
    decoder_steps: int = 6000
    steps: int = 10000
    batch_size: int = 64
    learning_rate: float = 1e-3
    layers: int = 4
    heads: int = 4
    patch_size: int = 2
    text_width: int = 128
    text_layers: int = 3
    vocabulary: int = 2000
    device: str = "cpu"
    cache_dir: str = "emoji_cache"
    output_dir: str = str(HERE / "emoji")


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


def mirror_some(images: Tensor, allowed: Tensor) -> Tensor:
    """Mirror about half of the images that may be mirrored."""
    mirrored = allowed & (torch.rand(len(images)) < 0.5)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


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
    """Train a VAE on the pictures, with a weak prior on the latents."""
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


def train_decoder(vae: AutoencoderKL, latents: Tensor, emoji: Emoji, recipe: Recipe) -> dict[str, Any]:
    """Train the decoder further for the same latents, so that a denoiser that was trained on them stays valid.

    Args:
        latents: as from `encode`.
    """
    model = nn.ModuleList([vae.post_quant_conv, vae.decoder]).to(recipe.device)
    checkpoint = Path(recipe.cache_dir) / "decoder.pt"
    training = Training(model, checkpoint, recipe.decoder_steps, recipe.vae_learning_rate, decay=0.999)
    pictures = torch.stack([emoji.images, emoji.images.flip(-1)])

    def loss_of_batch() -> Tensor:
        mirrored, chosen = (
            torch.randint(2, (recipe.vae_batch_size,)),
            torch.randint(len(emoji), (recipe.vae_batch_size,)),
        )
        noisy = latents[mirrored, chosen] + DECODED_NOISE * torch.randn(recipe.vae_batch_size, LATENT_CHANNELS, 8, 8)
        with torch.autocast(recipe.device, torch.bfloat16):
            scaled = noisy.to(recipe.device) / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(scaled).sample
        return reconstruction_error(decoded.float(), pictures[mirrored, chosen].to(recipe.device))

    training.run(loss_of_batch)
    return training.summary()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents of the images and of their mirror images, `[2, n, 16, 8, 8]`, times the scaling factor."""
    found = [vae.encode(part).latent_dist.mean for both in (images, images.flip(-1)) for part in both.split(100)]
    latents = (torch.cat(found) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return latents.unflatten(0, (2, len(images)))


def set_scaling_factor(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the VAE's shift and scaling factor so that these images' latents have a mean of 0 and a deviation of 1."""
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = encode(vae, images)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))


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
    training.run(lambda: flow_matching_loss(pipe, *draw(latents, emoji, captions, recipe.batch_size)))
    return training.summary()


def draw(latents: Tensor, emoji: Emoji, captions: Captions, size: int) -> tuple[Tensor, Tensor]:
    """A batch of latents `[b, 16, 8, 8]`, some of them of mirror images, and captions `[b, 16]`."""
    chosen = torch.randint(len(emoji), (size,))
    mirrored = (emoji.can_be_mirrored[chosen] & (torch.rand(size) < 0.5)).long()
    return latents[mirrored, chosen], captions.draw(chosen)


def flow_matching_loss(pipe: StableDiffusion3Pipeline, clean: Tensor, tokens: Tensor) -> Tensor:
    """The squared error of the velocity at timesteps of a logit-normal density (arXiv 2403.03206, Eq. 2 and 19)."""
    device = pipe.transformer.device
    clean, noise = clean.to(device), torch.randn(clean.shape).to(device)
    sigma = compute_density_for_timestep_sampling("logit_normal", len(clean), 0.0, 1.0).to(device)
    prompt, pooled = embed(pipe, tokens.to(device), number_of_empty_tokens())
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = pipe.transformer(noisy, prompt, pooled, 1000 * sigma).sample
    return functional.mse_loss(velocity, noise - clean)


def write_reference(folder: Path, emoji: Emoji) -> None:
    """Write the pictures as a folder for `reference=`: `reference.parquet` with image, prompt and category."""
    table = {"image": [to_webp(image) for image in emoji.images], "prompt": emoji.names, "category": emoji.categories}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "reference.parquet", compression="none")


def to_webp(image: Tensor) -> bytes:
    content = io.BytesIO()
    to_picture(image).save(content, "webp", lossless=True, quality=100)
    return content.getvalue()


def write_prompts(folder: Path, emoji: Emoji) -> None:
    """Write two files for `prompts=`, in random order: every caption, and the names alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [(caption, i) for i, phrases in enumerate(emoji.captions) for caption in phrases]
    for name, chosen in (("prompts.csv", rows), ("names.csv", [(name, i) for i, name in enumerate(emoji.names)])):
        order = torch.randperm(len(chosen), generator=generator).tolist()
        prompts, numbers = zip(*(chosen[i] for i in order), strict=True)
        categories = [emoji.categories[i] for i in numbers]
        pyarrow.csv.write_csv(pa.table({"prompt": list(prompts), "category": categories}), folder / name)


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


def draw_grid(pipe: StableDiffusion3Pipeline, path: Path, scale: float) -> None:
    """Write a picture of 24 prompts at a guidance scale."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(SHOWN))]
    pictures = pipe(SHOWN, guidance_scale=scale, num_inference_steps=25, max_sequence_length=1, generator=noise).images
    grid([pictures[:12], pictures[12:]]).save(path)


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    out = Path(recipe.output_dir)
    torch.manual_seed(recipe.seed)
    emoji = load_emoji(Path(recipe.cache_dir))
    vae, vae_training = train_vae(emoji, recipe)
    set_scaling_factor(vae, emoji.images)
    pipe = new_pipeline(vae, [caption for phrases in emoji.captions for caption in phrases], recipe)
    latents = encode(vae, emoji.images)
    denoiser_training = train_denoiser(pipe, latents, emoji, recipe)
    decoder_training = train_decoder(vae, latents, emoji, recipe)
    pipe.to(torch.float16).save_pretrained(out)
    write_prompts(out, emoji)
    write_reference(out.with_name("noto_emoji"), emoji)
    parameters = {
        n: sum(p.numel() for p in part.parameters())
        for n, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    recipe_used = {name: value for name, value in asdict(recipe).items() if name not in ("cache_dir", "output_dir")}
    summary = {
        "recipe": recipe_used,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "vae": vae_training,
        "denoiser": denoiser_training,
        "decoder": decoder_training,
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_grid(StableDiffusion3Pipeline.from_pretrained(out), out.with_name("emoji.png"), scale=4.0)


if __name__ == "__main__":
    main()
