"""The files beside the weights of the teacher that draws emoji: reference, prompts, and a picture of samples."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from stages.base.pictures import grid, to_picture
from stages.embedded.emoji import Emoji


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
