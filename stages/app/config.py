"""The options of the app."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from stages.configuration.options import option


@dataclass
class AppConfig:
    adapter_dir: str = option(MISSING, "the adapter: a folder on disk or in a bucket, or a hub id")
    pretrained_model_name_or_path: str | None = option(None, "the pipeline; by default the adapter's base")
    lora: str | None = option(None, "folder, file or hub id of a LoRA to load into the pipeline first")
    num_inference_steps: int = option(25, "denoising steps per picture", at_least=1, at_most=1000)
    device: str = option("auto", "`auto` (a GPU if there is one), `cuda` or `cpu`")
    host: str = option("127.0.0.1", "address to listen at; `0.0.0.0` lets other machines in")
    port: int = option(7860, "port to listen at; 0 takes a free one", at_least=0, at_most=65535)
