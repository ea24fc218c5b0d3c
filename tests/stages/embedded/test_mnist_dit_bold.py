"""The fine-tuned checkpoint of the embedded base is stock, belongs to that base, and guidance changes its samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from stages.embedded.attributes import stroke_width
from stages.embedded.digits import thicken, to_images
from stages.evaluate.metrics import ImageMetrics, Reference

EMBEDDED = Path(__file__).parents[3] / "stages" / "embedded"
BASE, FOLDER, DIGITS = EMBEDDED / "mnist_dit", EMBEDDED / "mnist_dit_bold", EMBEDDED / "digits_bold"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    loaded = DiTPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_stock_class_loads_the_folder_unchanged(pipe: DiTPipeline) -> None:
    assert type(pipe) is DiTPipeline
    assert type(pipe.transformer) is DiTTransformer2DModel
    assert pipe.get_label_ids(["7"]) == [7]
    assert pipe([7], num_inference_steps=2).images[0].size == (32, 32)


def test_only_the_denoisers_weights_differ_from_the_base() -> None:
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (BASE, FOLDER)]
    assert files[0] == files[1]
    for name in files[0] - {WEIGHTS, Path("training.json")}:
        assert (FOLDER / name).read_bytes() == (BASE / name).read_bytes(), name
    before, after = load_file(BASE / WEIGHTS), load_file(FOLDER / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape, name
        assert not torch.equal(tensor, after[name]), name


def test_its_embedded_files_are_at_most_eight_megabytes_of_safetensors() -> None:
    files = [path for folder in (FOLDER, DIGITS) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_the_reference_is_that_of_the_base_thickened() -> None:
    thin, bold = (load_file(folder / "reference.safetensors") for folder in (EMBEDDED / "digits", DIGITS))
    assert torch.equal(bold["pixels"], thicken(thin["pixels"]))
    assert torch.equal(bold["labels"], thin["labels"])
    reference = Reference("stages/embedded/digits_bold", "cpu")
    with torch.no_grad():
        right = reference.classifier(reference.images).argmax(1) == bold["labels"]
    assert right.float().mean() > 0.97


def test_guidance_matters(pipe: DiTPipeline) -> None:
    """A small version of the measurement of 2,000 samples in `training.json`; the digits must be bold, too."""
    reference = Reference("stages/embedded/digits_bold", "cpu")
    found = {}
    for scale in (1.0, 2.0):
        labels = [i % 10 for i in range(100)]
        images = pipe(labels, scale, torch.Generator().manual_seed(0), 10, "pt").images * 2 - 1
        metrics = ImageMetrics(reference)
        metrics.update(images, [{"class_label": label} for label in labels])
        found[scale] = metrics.compute()
    assert found[2.0]["frechet_distance"] < 0.8 * found[1.0]["frechet_distance"]
    assert found[2.0]["class_accuracy"] > found[1.0]["class_accuracy"] + 0.05
    thin = to_images(load_file(EMBEDDED / "digits" / "reference.safetensors")["pixels"])
    assert stroke_width(images).mean() > 1.5 * stroke_width(thin).mean()


def test_the_results_of_the_training_are_recorded() -> None:
    info = json.loads((FOLDER / "training.json").read_text())
    assert {"recipe", "seconds", "classifier_accuracy", "denoiser_loss_at_step", "guidance"} <= info.keys()
    rows = {row["guidance_scale"]: row for row in info["guidance"]}
    best = min((row for scale, row in rows.items() if scale >= 1.25), key=lambda row: row["frechet_distance"])
    assert best["frechet_distance"] < 0.8 * rows[1.0]["frechet_distance"]
    assert best["class_accuracy"] > rows[1.0]["class_accuracy"] + 0.05
    assert info["before_fine_tuning"]["frechet_distance"] > 2 * best["frechet_distance"]
