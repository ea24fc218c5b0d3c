"""What evaluation and sampling can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class EvaluateConfig:
    adapter_dir: str = field(default=MISSING, metadata={"help": "folder of the adapter"})
    guidance_scale: list[float] = field(
        default_factory=lambda: [1.5, 2.0, 3.0], metadata={"help": "scales to compare at"}
    )
    reference: str = field(
        default="stages/embedded/digits",
        metadata={
            "help": "folder with `reference.safetensors` (held-out real images) and `classifier/` (feature network)"
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "by default `evaluation` in the adapter's folder"})
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "the pipeline; by default the base that the adapter names"}
    )
    num_samples: int = field(default=1000, metadata={"help": "images per method and scale, classes in turn"})
    num_inference_steps: int = field(default=25, metadata={"help": "denoising steps per image"})
    batch_size: int = field(default=100, metadata={"help": "images sampled at once"})
    seed: int = field(default=0, metadata={"help": "seed of the noise, the same for every method"})
    device: str = field(default="auto", metadata={"help": "`auto` (a GPU where there is one), `cuda` or `cpu`"})


@dataclass
class SampleConfig:
    adapter_dir: str = field(default=MISSING, metadata={"help": "folder of the adapter"})
    class_labels: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "one image each"})
    guidance_scale: float = field(default=2.0, metadata={"help": "scale of the guided and the one-pass row"})
    output: str = field(default="grid.png", metadata={"help": "image file"})
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "the pipeline; by default the base that the adapter names"}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "denoising steps per image"})
    seed: int = field(default=0, metadata={"help": "seed of the noise, the same for every row"})
    device: str = field(default="auto", metadata={"help": "`auto` (a GPU where there is one), `cuda` or `cpu`"})
