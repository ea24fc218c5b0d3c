"""The embedded teacher is stock and small, and guidance changes its samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from stages.embedded.classifier import DigitClassifier
from stages.evaluate.metrics import ImageMetrics, Reference

EMBEDDED = Path(__file__).parents[3] / "stages" / "embedded"


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    loaded = DiTPipeline.from_pretrained(EMBEDDED / "mnist_dit")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_stock_class_loads_the_folder_unchanged(pipe: DiTPipeline) -> None:
    assert type(pipe) is DiTPipeline
    assert type(pipe.transformer) is DiTTransformer2DModel
    assert type(pipe.vae) is AutoencoderKL
    assert pipe.get_label_ids(["7"]) == [7]
    assert pipe([7], num_inference_steps=2).images[0].size == (32, 32)


def test_the_embedded_files_are_at_most_eight_megabytes_of_safetensors() -> None:
    ours = [EMBEDDED / name for name in ("mnist_dit", "digits")]
    files = [path for folder in ours for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_guidance_matters(pipe: DiTPipeline) -> None:
    """A small version of the measurement of 2,000 samples in `training.json`."""
    reference = Reference("stages/embedded/digits", "cpu")
    found = {}
    for scale in (1.0, 2.0):
        labels = [i % 10 for i in range(100)]
        images = pipe(labels, scale, torch.Generator().manual_seed(0), 10, "pt").images * 2 - 1
        metrics = ImageMetrics(reference)
        metrics.update(images, [{"class_label": label} for label in labels])
        found[scale] = metrics.compute()
    assert found[2.0]["frechet_distance"] < 0.8 * found[1.0]["frechet_distance"]
    assert found[2.0]["class_accuracy"] > found[1.0]["class_accuracy"] + 0.05


def test_the_results_of_the_training_are_recorded() -> None:
    info = json.loads((EMBEDDED / "mnist_dit" / "training.json").read_text())
    assert {"recipe", "seconds", "classifier_accuracy", "vae_error", "denoiser_loss_at_step", "guidance"} <= info.keys()
    rows = {row["guidance_scale"]: row for row in info["guidance"]}
    best = min((row for scale, row in rows.items() if scale >= 1.25), key=lambda row: row["frechet_distance"])
    assert best["frechet_distance"] < 0.8 * rows[1.0]["frechet_distance"]
    assert best["class_accuracy"] > rows[1.0]["class_accuracy"] + 0.05


def test_the_classifier_classifies_held_out_digits() -> None:
    held_out = load_file(EMBEDDED / "digits" / "reference.safetensors")
    reference = Reference("stages/embedded/digits", "cpu")
    assert isinstance(reference.classifier, DigitClassifier)
    with torch.no_grad():
        right = reference.classifier(reference.images).argmax(1) == held_out["labels"]
    assert right.float().mean() > 0.97
