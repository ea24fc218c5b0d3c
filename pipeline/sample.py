"""Adapter -> images: an unguided, a guided and a one-pass row from the same noise.

python -m pipeline.sample adapter_dir=runs/mnist_dit class_labels=[0,1,2] guidance_scale=2 output=grid.png
"""

from __future__ import annotations

from pathlib import Path

from pipeline.command import run
from stages.base import choose_device, decode
from stages.config import check_bounds
from stages.errors import UserError
from stages.evaluate.comparisons import check_class_labels, load_pair, sample, settings
from stages.evaluate.config import SampleConfig
from stages.evaluate.report import TITLES, grid
from stages.records.storage import whole_file


def main(config: SampleConfig) -> None:
    check_bounds(config)
    output = Path(config.output)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"output={output}: name an image file, e.g. grid.png")
    pipe, adapter = load_pair(config.adapter_dir, config.pretrained_model_name_or_path, choose_device(config.device))
    labels = list(config.class_labels)
    check_class_labels(labels, adapter)
    seeds = [(config.seed << 32) + i for i in range(len(labels))]
    rows = []
    for setting in settings([config.guidance_scale]):
        samples = sample(pipe, adapter, setting, labels, seeds, config.num_inference_steps)
        rows.append(decode(pipe, samples.latents))
        evaluations = samples.denoiser_evaluations // len(labels)
        print(f"{TITLES[setting.method]}: {evaluations} denoiser evaluations per image")
    with whole_file(output) as file:
        grid(rows).save(file, format="jpeg" if output.suffix.lower() == ".jpg" else output.suffix[1:])
    print(f"{output}: {len(labels)} images in each of {len(rows)} rows")


if __name__ == "__main__":
    run(SampleConfig, main, __doc__)
