"""A stock pipeline loads the embedded LoRA, and draws bold digits with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from stages.embedded.attributes import STROKES, attributes

EMBEDDED = Path(__file__).parents[3] / "stages" / "embedded"
FOLDER = EMBEDDED / "mnist_sd_bold_lora"
PROMPTS = [f"a thin {numeral} leaning left" for numeral in ("zero", "two", "three", "six")] * 4


def share_of_bold(pipe: StableDiffusionPipeline) -> float:
    generator = torch.Generator().manual_seed(0)
    images = pipe(PROMPTS, guidance_scale=2.0, num_inference_steps=10, generator=generator, output_type="pt").images
    strokes = attributes(images.mean(1, keepdim=True) * 2 - 1)[:, 0]
    return float((strokes == list(STROKES).index("bold")).float().mean())


def test_a_stock_pipeline_loads_it_and_draws_bold_digits() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "mnist_sd")
    pipe.set_progress_bar_config(disable=True)
    assert share_of_bold(pipe) <= 0.1
    pipe.load_lora_weights(FOLDER)
    assert share_of_bold(pipe) >= 0.9
    pipe.unload_lora_weights()
    assert share_of_bold(pipe) <= 0.1


def test_the_results_of_the_training_are_recorded() -> None:
    info = json.loads((FOLDER / "training.json").read_text())
    at_two = next(row for row in info["guidance"] if row["guidance_scale"] == 2.0)
    assert at_two["frechet_distance"] < info["without_it"]["frechet_distance"] / 5
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
