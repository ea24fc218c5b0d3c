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
    to_picture(image).save(content, "webp", quality=90, method=6)
    return content.getvalue()


def write_prompts(folder: Path, emoji: Emoji) -> None:
    """Write three files for `prompts=`, in random order.

    `prompts.csv`: every caption. `names.csv`: the names alone. `negatives.csv`: each name with a negative prompt, the
    name of its neighbour in Unicode's order, which is mostly of the same kind; then the names again, without one.
    """
    generator = torch.Generator().manual_seed(0)
    captions = [caption for phrases in emoji.captions for caption in phrases]
    shuffled = [captions[i] for i in torch.randperm(len(captions), generator=generator).tolist()]
    order = torch.randperm(len(emoji), generator=generator).tolist()
    names, neighbours = ([emoji.names[i + shift] for i in order] for shift in (0, -1))
    tables = {
        "prompts.csv": {"prompt": shuffled},
        "names.csv": {"prompt": names},
        "negatives.csv": {"prompt": names * 2, "negative_prompt": neighbours + [""] * len(names)},
    }
    for name, columns in tables.items():
        pyarrow.csv.write_csv(pa.table(columns), folder / name)


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
