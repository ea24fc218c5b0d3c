"""What evaluation and sampling can be told."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from stages.config import option

MOST = 2**31 - 1


@dataclass
class EvaluateConfig:
    adapter_dir: str = option(MISSING, "folder of the adapter")
    guidance_scale: list[float] = option(lambda: [1.5, 2.0, 3.0], "scales to compare at")
    prompts: str | None = option(
        None,
        "where the pipeline takes prompts: a file with a column prompt and a column class_label (.jsonl, .csv, .parquet)",
    )
    reference: str = option(
        "stages/embedded/digits",
        "folder with `reference.safetensors` (held-out real images) and `classifier/` (feature network)",
    )
    output_dir: str | None = option(None, "by default `evaluation` in the adapter's folder")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the base that the adapter names")
    num_samples: int = option(1000, "images per method and scale, classes or prompts in turn", at_least=2)
    num_inference_steps: int = option(25, "denoising steps per image", at_least=1, at_most=1000)
    batch_size: int = option(100, "images sampled at once", at_least=1)
    seed: int = option(0, "seed of the noise, the same for every method", at_least=0, at_most=MOST)
    device: str = option("auto", "`auto` (a GPU where there is one), `cuda` or `cpu`")


@dataclass
class SampleConfig:
    adapter_dir: str = option(MISSING, "folder of the adapter")
    class_labels: list[int] | None = option(
        None, "one image each; by default all classes that the adapter was trained on"
    )
    prompts: list[str] = option(list, "one image each, where the pipeline takes prompts")
    guidance_scale: float = option(2.0, "scale of the guided and the one-pass row", above=1)
    output: str = option("grid.png", "image file")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the base that the adapter names")
    num_inference_steps: int = option(25, "denoising steps per image", at_least=1, at_most=1000)
    seed: int = option(0, "seed of the noise, the same for every row", at_least=0, at_most=MOST)
    device: str = option("auto", "`auto` (a GPU where there is one), `cuda` or `cpu`")
