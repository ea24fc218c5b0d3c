"""Sample: adapter -> images, an unguided, a guided and a one-pass row from the same noise.

python -m pipeline.sample adapter_dir=runs/mnist_dit 'class_labels=[0,1,2]' guidance_scale=2 output=grid.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.command import run
from stages.adapters import GuidanceAdapter
from stages.base.loading import choose_device
from stages.base.pictures import PICTURES, grid, to_picture
from stages.base.prompts import READERS
from stages.base.sampling import Condition, Request, decode, noise_seeds
from stages.configuration.options import check_bounds
from stages.errors import UsageError, UserError
from stages.evaluate.comparisons import (
    arguments_of,
    fit_to_pipeline,
    load_recorded,
    recorded_class,
    sample_setting,
    settings,
)
from stages.evaluate.conditions import conditions_of
from stages.evaluate.config import SampleConfig
from stages.evaluate.methods import title_of
from stages.evaluate.sizes import at_size, check_size, warn_of_another_size
from stages.evaluate.threads import threads_that_pay
from stages.storage.files import check_file, whole_file


def main(config: SampleConfig) -> None:
    check_bounds(config)
    output = Path(config.output)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"output={output}: name an image file, e.g. grid.png")
    check_file(output)
    check_texts(config.prompts)
    adapter, device = GuidanceAdapter.from_pretrained(config.adapter_dir), choose_device(config.device)
    if (kind := recorded_class(adapter.metadata)) is not None:
        conditions_at_size(config, kind, adapter)  # fails before the pipeline is loaded
    pipe = load_recorded(adapter.metadata, config.pretrained_model_name_or_path, device)
    adapter = fit_to_pipeline(adapter, pipe)
    conditions, arguments = conditions_at_size(config, type(pipe), adapter), arguments_of(pipe, adapter)
    check_size(pipe, conditions[0], arguments)
    warn_of_another_size(pipe, adapter.metadata, conditions[0], arguments)
    seeds = noise_seeds(config.seed, range(len(conditions)))
    request = Request(conditions, seeds, config.num_inference_steps, arguments)
    rows = []
    for setting in settings([config.guidance_scale]):
        with threads_that_pay(pipe):
            samples = sample_setting(pipe, adapter, setting, request)
            rows.append(decode(pipe, samples.latents))
        evaluations = samples.denoiser_evaluations // len(conditions)
        fused = {True: ", fused into the base's weights", False: ", not fused", None: ""}[samples.fused]
        print(f"{title_of(setting.method)}: {evaluations} denoiser evaluations per image{fused}")
    with whole_file(output) as file:
        grid([[to_picture(image) for image in row] for row in rows]).save(
            file, format="jpeg" if output.suffix.lower() == ".jpg" else output.suffix[1:]
        )
    print(f"{output}: {len(conditions)} images in each of {len(rows)} rows")


def conditions_at_size(config: SampleConfig, kind: type, adapter: GuidanceAdapter) -> list[Condition]:
    """The conditions to sample by a pipeline of this class."""
    pictures = {name: getattr(config, name) for name in PICTURES if getattr(config, name)}
    return at_size(conditions_of(kind, adapter, config.class_labels, list(config.prompts), pictures), config.size)


def check_texts(prompts: Sequence[str]) -> None:
    """
    Raises:
        UsageError: one of the prompts is a file of prompts.
    """
    for prompt in prompts:
        if Path(prompt).suffix in READERS and Path(prompt).is_file():
            raise UsageError(
                f"prompts=[{prompt}]: is a file: give texts, such as prompts=[panda,rose]; pipeline.evaluate takes a file"
            )


if __name__ == "__main__":
    run(SampleConfig, main, __doc__)
