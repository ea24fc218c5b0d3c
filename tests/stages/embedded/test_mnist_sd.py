"""The embedded text-to-image teacher is stock and small, and guidance changes its samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from stages.base.prompts import read_prompts
from stages.base.sampling import Request, decode, sample, undecoded
from stages.embedded.attributes import read_caption
from stages.evaluate.metrics import ImageMetrics, Reference

FOLDER = Path(__file__).parents[3] / "stages" / "embedded" / "mnist_sd"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_stock_class_loads_the_folder_unchanged(pipe: StableDiffusionPipeline) -> None:
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.unet) is UNet2DConditionModel
    assert type(pipe.vae) is AutoencoderKL
    assert type(pipe.text_encoder) is CLIPTextModel
    assert type(pipe.tokenizer) is CLIPTokenizer
    assert pipe("a bold seven leaning right", num_inference_steps=2).images[0].size == (32, 32)


def test_the_tokenizer_knows_its_words_and_spells_others(pipe: StableDiffusionPipeline) -> None:
    assert pipe.tokenizer.tokenize("a bold seven leaning right") == [
        "a</w>", "bold</w>", "seven</w>", "leaning</w>", "right</w>"
    ]  # fmt: skip
    assert len(pipe.tokenizer.tokenize("cat")) == 3
    assert pipe.tokenizer.model_max_length == 16


def test_it_is_at_most_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_every_embedded_prompt_is_a_caption_of_its_class() -> None:
    prompts = read_prompts(str(FOLDER / "prompts.csv"))
    assert len(prompts) == 3000
    for row in prompts:
        attributes = read_caption(row["prompt"])
        assert attributes is not None
        assert attributes[0] == row["class_label"]


def test_guidance_matters(pipe: StableDiffusionPipeline) -> None:
    """A small version of the measurement of 2,000 samples in `training.json`."""
    reference = Reference("stages/embedded/digits", "cpu")
    prompts = read_prompts(str(FOLDER / "prompts.csv"))[:100]
    found = {}
    for scale in (1.0, 2.0):
        with undecoded(pipe) as latents, torch.no_grad():
            sample(pipe, Request(prompts, range(100), 10, {}), scale)
        metrics = ImageMetrics(reference)
        metrics.update(decode(pipe, latents[0]), prompts)
        found[scale] = metrics.compute()
    assert found[2.0]["class_accuracy"] > found[1.0]["class_accuracy"] + 0.02


def test_the_results_of_the_training_are_recorded() -> None:
    info = json.loads((FOLDER / "training.json").read_text())
    assert {"recipe", "seconds", "loss_at_step", "unet_parameters", "guidance"} <= info.keys()
    rows = {row["guidance_scale"]: row for row in info["guidance"]}
    best = min((row for scale, row in rows.items() if scale >= 1.25), key=lambda row: row["frechet_distance"])
    assert best["frechet_distance"] < 0.8 * rows[1.0]["frechet_distance"]
    assert best["class_accuracy"] > rows[1.0]["class_accuracy"] + 0.05
