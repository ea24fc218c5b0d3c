"""The embedded teacher `emoji` is stock and small, and guidance changes its samples."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from stages.base.loading import load_pipeline
from stages.base.prompts import read_prompts
from stages.base.sampling import Request, decode, sample, undecoded
from stages.evaluate.metrics import ImageMetrics
from stages.evaluate.reference import Reference

EMBEDDED = Path(__file__).parents[3] / "stages" / "embedded"
FOLDER, REFERENCE = EMBEDDED / "emoji", EMBEDDED / "noto_emoji"
CALL = {"max_sequence_length": 1}
PROMPTS = ["panda", "red apple", "rocket", "house", "rose", "crown"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    loaded = load_pipeline(str(FOLDER))
    assert isinstance(loaded, StableDiffusion3Pipeline)
    return loaded


def test_the_stock_class_loads_the_folder_unchanged(pipe: StableDiffusion3Pipeline) -> None:
    assert type(pipe) is StableDiffusion3Pipeline
    assert type(pipe.transformer) is SD3Transformer2DModel
    assert type(pipe.vae) is AutoencoderKL
    assert type(pipe.text_encoder) is type(pipe.text_encoder_2) is CLIPTextModelWithProjection
    assert type(pipe.tokenizer) is type(pipe.tokenizer_2) is CLIPTokenizer
    assert pipe.text_encoder_3 is None
    assert pipe.transformer.inner_dim == 256
    assert pipe("panda", num_inference_steps=2).images[0].size == (64, 64)


def test_the_default_number_of_empty_tokens_changes_less_than_the_noise(pipe: StableDiffusion3Pipeline) -> None:
    def images(seed: int, **call: int) -> torch.Tensor:
        call |= {"num_inference_steps": 8}
        noise = torch.Generator().manual_seed(seed)
        return torch.from_numpy(pipe(PROMPTS, generator=noise, output_type="np", **call).images)

    few = images(0, **CALL)
    assert (images(0) - few).square().mean() < (images(1, **CALL) - few).square().mean() / 4


def test_it_is_at_most_twenty_five_megabytes_with_its_pictures() -> None:
    files = [path for folder in (FOLDER, REFERENCE) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_every_name_is_the_prompt_of_a_picture() -> None:
    names = [row["prompt"] for row in read_prompts(str(FOLDER / "names.csv"))]
    table = pq.read_table(REFERENCE / "reference.parquet")
    assert sorted(names) == sorted(table["prompt"].to_pylist())
    assert set(names) <= {row["prompt"] for row in read_prompts(str(FOLDER / "prompts.csv"))}


def test_guidance_matters(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    """A small version of the measurement on the embedded teachers' page, among the pictures of 60 names."""
    table = pq.read_table(REFERENCE / "reference.parquet").take(list(range(0, 960, 16)))
    pq.write_table(table, tmp_path / "reference.parquet")
    reference = Reference(str(tmp_path), "cpu", "efficientnet_lite0")
    prompts = [{"prompt": name} for name in table["prompt"].to_pylist()]
    found = {}
    for scale in (1.0, 3.0):
        with undecoded(pipe) as latents, torch.no_grad():
            sample(pipe, Request(prompts, range(len(prompts)), 10, CALL), scale)
        metrics = ImageMetrics(reference)
        metrics.update(decode(pipe, latents[0]), prompts)
        found[scale] = metrics.compute()
    assert found[3.0]["retrieval_top1"] > found[1.0]["retrieval_top1"] + 0.1
    assert found[3.0]["frechet_distance"] < found[1.0]["frechet_distance"]


def test_the_training_is_recorded() -> None:
    info = json.loads((FOLDER / "training.json").read_text())
    assert {"recipe", "parameters", "vae", "denoiser", "decoder"} <= info.keys()
