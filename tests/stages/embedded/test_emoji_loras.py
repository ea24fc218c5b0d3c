"""Two LoRAs of the embedded teacher `emoji` load into the stock pipeline and do what their names say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from stages.base.loading import load_pipeline

EMBEDDED = Path(__file__).parents[3] / "stages" / "embedded"
PROMPTS = ["panda", "red apple", "rocket", "frog", "rose", "pizza", "crying face", "butterfly"]


@pytest.fixture
def pipe() -> Iterator[StableDiffusion3Pipeline]:
    loaded = load_pipeline(str(EMBEDDED / "emoji"))
    assert isinstance(loaded, StableDiffusion3Pipeline)
    yield loaded
    loaded.unload_lora_weights()


def images(pipe: StableDiffusion3Pipeline, steps: int, scale: float) -> Tensor:
    """`[n, 64, 64, 3]` in [0, 1]."""
    call = {"max_sequence_length": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return torch.from_numpy(pipe(PROMPTS, num_inference_steps=steps, guidance_scale=scale, **call).images)


def colourfulness(pictures: Tensor) -> float:
    return float((pictures.amax(-1) - pictures.amin(-1)).mean())


def test_the_style_takes_most_of_the_colour(pipe: StableDiffusion3Pipeline) -> None:
    colourful = colourfulness(images(pipe, 10, 3.0))
    pipe.load_lora_weights(EMBEDDED / "emoji_grey_lora")
    assert colourfulness(images(pipe, 10, 3.0)) < colourful / 2


def test_four_steps_with_the_few_step_lora_come_nearer_to_many(pipe: StableDiffusion3Pipeline) -> None:
    many, few = images(pipe, 24, 1.0), images(pipe, 4, 1.0)
    pipe.load_lora_weights(EMBEDDED / "emoji_few_step_lora")
    assert (images(pipe, 4, 1.0) - many).square().mean() < (few - many).square().mean() * 2 / 3


@pytest.mark.parametrize("name", ["emoji_grey_lora", "emoji_few_step_lora"])
def test_the_training_is_recorded(name: str) -> None:
    folder = EMBEDDED / name
    assert {"recipe", "parameters", "steps", "seconds", "loss_at_step"} <= json.loads(
        (folder / "training.json").read_text()
    ).keys()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_200_000
