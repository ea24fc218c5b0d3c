"""What evaluation and sampling can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from stages.configuration.options import option
from stages.evaluate.comparisons import COMPARED
from stages.evaluate.feature_extractors import CLASSIFIER, NETWORKS

MOST = 2**31 - 1


@dataclass
class EvaluateConfig:
    adapter_dir: Any = option(
        MISSING,
        "folder of the adapter, on disk or in a bucket, or its hub id; or a list of them: adapters of one base, compared in one run",
        kind=str | list[str],
    )
    guidance_scale: list[float] = option(lambda: [1.5, 2.0, 3.0], "scales to compare at")
    methods: list[str] = option(
        lambda: list(COMPARED),
        "what is compared with no guidance and CFG: `one_pass`, and CFG on the first steps only: `cfg_first_50`, "
        "`cfg_first_60`",
    )
    prompts: str | None = option(
        None,
        "where the pipeline takes prompts: a file with a column prompt and perhaps class_label (.txt, .jsonl, .csv, "
        ".parquet), and with image, mask_image or video where it takes pictures: their paths, relative to the file",
    )
    reference: str | None = option(
        "stages/embedded/digits",
        "folder of real images: `reference.safetensors` and `classifier/`, or image files (png, jpg, webp); or null",
    )
    features: str = option(CLASSIFIER, "feature network: the reference's `classifier`, or `inception`", one_of=NETWORKS)
    inception_weights: str | None = option(
        None, "file of InceptionV3's weights; by default torch-fidelity downloads it"
    )
    clip_model: str | None = option(None, "folder or hub id of a CLIP model: adds the CLIP score of prompts")
    output_dir: str | None = option(None, "by default `evaluation` in the adapter's folder")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the base that the adapter names")
    lora: str | None = option(
        None, "folder, file or hub id of a LoRA that the pipeline loads first: does the adapter compose with it?"
    )
    scheduler: str | None = option(
        None, "a scheduler class of diffusers in place of the pipeline's own, with its configuration"
    )
    num_samples: int = option(1000, "images per method and scale, classes or prompts in turn", at_least=2)
    num_inference_steps: int = option(25, "denoising steps per image", at_least=1, at_most=1000)
    batch_size: int = option(100, "images sampled at once; an interrupted run goes on with the next batch", at_least=1)
    seed: int = option(0, "seed of the noise, the same for every method", at_least=0, at_most=MOST)
    save_images: bool = option(False, "keep every image: output_dir/images/METHOD-SCALE/NUMBER.png")
    device: str = option("auto", "`auto` (a GPU where there is one; several share the work), `cuda` or `cpu`")


@dataclass
class SampleConfig:
    adapter_dir: str = option(MISSING, "folder of the adapter, on disk or in a bucket, or its hub id")
    class_labels: list[int] | None = option(
        None, "one image each; by default all classes that the adapter was trained on"
    )
    prompts: list[str] = option(list, "one image each, where the pipeline takes prompts")
    image: list[str] = option(list, "paths, one for each image, where the pipeline takes pictures")
    mask_image: list[str] = option(list, "paths of masks, one for each image, where the pipeline takes them")
    video: list[str] = option(list, "paths of moving pictures, one for each image, where the pipeline takes them")
    guidance_scale: float = option(2.0, "scale of the guided and the one-pass row", above=1)
    output: str = option("grid.png", "image file")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the base that the adapter names")
    num_inference_steps: int = option(25, "denoising steps per image", at_least=1, at_most=1000)
    seed: int = option(0, "seed of the noise, the same for every row", at_least=0, at_most=MOST)
    device: str = option("auto", "`auto` (a GPU where there is one), `cuda` or `cpu`")
