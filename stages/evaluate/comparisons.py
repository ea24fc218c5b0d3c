"""The ways of sampling that are compared, each through the stock pipeline and from the same noise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters import GuidanceAdapter
from stages.base import bind_inputs, denoiser_of, load_pipeline, undecoded
from stages.errors import UserError

NONE, CFG, ONE_PASS = "none", "cfg", "one_pass"


@dataclass(frozen=True)
class Setting:
    """A method at a guidance scale; `none` is always at 1."""

    method: str
    guidance_scale: float


@dataclass(frozen=True)
class Samples:
    """Final latents `[n, c, h, w]` as the VAE is handed them, and what they cost; decoding is not counted."""

    latents: Tensor
    denoiser_evaluations: int
    seconds: float


def settings(scales: list[float]) -> list[Setting]:
    """No guidance once, then both ways of guiding at every scale."""
    if not scales or not all(1 < scale < float("inf") for scale in scales):
        raise UserError(
            f"guidance_scale={list(scales)}: name scales above 1; 1 is no guidance, which is always compared"
        )
    return [Setting(NONE, 1.0), *(Setting(method, scale) for scale in scales for method in (CFG, ONE_PASS))]


def load_pair(adapter_dir: str, name_or_path: str | None, device: str) -> tuple[Any, GuidanceAdapter]:
    """The pipeline and the adapter for it, not attached yet."""
    adapter = GuidanceAdapter.from_pretrained(adapter_dir)
    pipe = load_pipeline(name_or_path or adapter.about["base"]["pretrained_model_name_or_path"], device=device)
    adapter.attach(pipe)  # a base that does not fit is refused here, before anything is sampled
    adapter.detach()
    return pipe, adapter.to(device)


def trained_class_labels(adapter: GuidanceAdapter) -> list[int]:
    """The classes that the adapter's dataset holds."""
    return list(adapter.about["conditions"]["class_labels"]["trained"])


def check_class_labels(labels: list[int], adapter: GuidanceAdapter) -> None:
    trained = trained_class_labels(adapter)
    if not labels or not set(labels) <= set(trained):
        known = f"{trained[0]} to {trained[-1]}" if len(trained) == trained[-1] - trained[0] + 1 else str(trained)
        raise UserError(f"class_labels={list(labels)}: name classes that the adapter was trained on: {known}")


def sample(
    pipe: Any, adapter: GuidanceAdapter, setting: Setting, class_labels: list[int], seeds: list[int], num_steps: int
) -> Samples:
    """Sample one image per class label, its noise from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with undecoded(pipe) as latents, counted(denoiser_of(pipe)[1]) as count:
        if setting.method == ONE_PASS:
            adapter.attach(pipe)
        try:
            synchronize(pipe)
            start = time.perf_counter()
            pipe(
                class_labels,
                guidance_scale=setting.guidance_scale,
                generator=generators,
                num_inference_steps=num_steps,
                output_type="pt",
            )
            synchronize(pipe)
            seconds = time.perf_counter() - start
        finally:
            if setting.method == ONE_PASS:
                adapter.detach()
    return Samples(latents[0], count[0], seconds)


def synchronize(pipe: Any) -> None:
    """Wait for the GPU, so that a clock read afterwards has seen all of its work."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[list[int]]:
    """Within it, the first item counts the denoiser's evaluations: one for each sample of each batch it is given."""
    count = [0]

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count[0] += len(next(iter(bind_inputs(module, args, kwargs).values())))

    handle = denoiser.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()
