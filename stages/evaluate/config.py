"""The options of evaluation and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from stages.configuration.options import option
from stages.evaluate.feature_extractors import CLASSIFIER, FEATURES
from stages.evaluate.methods import COMPARED

MAX_SEED = 2**31 - 1


@dataclass
class EvaluateConfig:
    adapter_dir: Any = option(
        MISSING,
        "the adapter: a folder on disk or in a bucket, or a hub id; or a list, to compare adapters of one base",
        kind=str | list[str],
    )
    guidance_scale: list[float] = option(lambda: [1.5, 2.0, 3.0], "guidance scales to compare at")
    methods: list[str] = option(
        lambda: list(COMPARED),
        "methods to compare with no guidance and CFG: `one_pass`, `one_pass_interval_20_80`, and CFG at some steps only: "
        "`cfg_first_50`, `cfg_interval_20_80`, `cfg_adaptive_0.99`, `cfg_every_2`, or with other numbers",
    )
    prompts: str | None = option(
        None,
        "if the pipeline takes prompts: a file (.txt, .jsonl, .csv, .parquet) with a column prompt, optionally "
        "class_label, and image, mask_image or video if it takes pictures: their paths, relative to the file",
    )
    reference: str | None = option(
        "stages/embedded/digits",
        "folder of real images: `reference.safetensors` and `classifier/`, `reference.parquet` (image, prompt, and "
        "optionally category), or image files (png, jpg, webp); or null",
    )
    features: str = option(
        CLASSIFIER,
        "feature network: the reference's `classifier`, `inception`, `efficientnet_lite0`, `dinov2` or `clip`",
        one_of=FEATURES,
    )
    features_model: str | None = option(
        None,
        "the feature network's weights: a file for `inception`, a folder or hub id for `dinov2` and `clip`; by default "
        "the published ones, which are downloaded",
    )
    clip_model: str | None = option(None, "folder or hub id of a CLIP model, to measure the CLIP score of prompts")
    preference: list[str] = option(
        list, "scores of images and their prompts by your own code, each `MODULE:NAME`; NAME becomes a column"
    )
    output_dir: str | None = option(None, "folder for the evaluation; by default `evaluation` in the adapter's folder")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the adapter's base")
    lora: str | None = option(
        None,
        "folder, file or hub id of a LoRA to load into the pipeline first, to test the adapter together with it",
    )
    scheduler: str | None = option(
        None, "a scheduler class of diffusers that replaces the pipeline's, with the same configuration"
    )
    num_samples: int = option(1000, "images per method and scale; classes or prompts are taken in turn", at_least=2)
    size: list[int] | None = option(
        None,
        "[width,height] of the images in pixels, or [width,height,frames] of the videos; by default the teacher's own",
    )
    num_inference_steps: int = option(25, "denoising steps per image", at_least=1, at_most=1000)
    batch_size: int = option(
        100, "images sampled at once; an interrupted run continues after the last whole batch", at_least=1
    )
    seed: int = option(0, "seed of the noise, the same for every method", at_least=0, at_most=MAX_SEED)
    save_images: bool = option(False, "keep every image: output_dir/images/METHOD-SCALE/NUMBER.png")
    device: str = option("auto", "`auto` (a GPU if there is one; several share the work), `cuda` or `cpu`")


@dataclass
class SampleConfig:
    adapter_dir: str = option(MISSING, "the adapter: a folder on disk or in a bucket, or a hub id")
    class_labels: list[int] | None = option(None, "classes to sample, one image each; by default all trained classes")
    prompts: list[str] = option(list, "prompts to sample, one image each, if the pipeline takes prompts")
    image: list[str] = option(list, "paths of pictures, one per image, if the pipeline takes them")
    mask_image: list[str] = option(list, "paths of masks, one per image, if the pipeline takes them")
    video: list[str] = option(list, "paths of videos, one per image, if the pipeline takes them")
    guidance_scale: float = option(2.0, "scale of the guided and the one-pass row", above=1)
    output: str = option("grid.png", "image file")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the adapter's base")
    size: list[int] | None = option(
        None,
        "[width,height] of the images in pixels, or [width,height,frames] of the videos; by default the teacher's own",
    )
    num_inference_steps: int = option(25, "denoising steps per image", at_least=1, at_most=1000)
    seed: int = option(0, "seed of the noise, the same for every row", at_least=0, at_most=MAX_SEED)
    device: str = option("auto", "`auto` (a GPU if there is one), `cuda` or `cpu`")
