"""The ways of sampling that are compared, each through the stock pipeline and from the same noise."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters import GuidanceAdapter
from stages.base import load_pipeline
from stages.denoiser import bind_inputs, denoiser_of
from stages.errors import UserError
from stages.sampling import Condition, Request, sample, takes_class_labels, undecoded

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
    base = adapter.about["base"]
    source = {} if name_or_path else {key: base[key] for key in ("revision", "variant")}
    pipe = load_pipeline(name_or_path or base["pretrained_model_name_or_path"], device=device, **source)
    adapter.attach(pipe)  # a base that does not fit is refused here, before anything is sampled
    adapter.detach()
    return pipe, adapter.to(device)


def arguments_of(pipe: Any, adapter: GuidanceAdapter) -> dict[str, Any]:
    """What the adapter's teacher was told besides, as far as this pipeline takes it: another rule's settings are left out."""
    known = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in adapter.about["arguments"].items() if name in known}


def conditions_of(
    pipe: Any, adapter: GuidanceAdapter, class_labels: list[int] | None, prompts: list[str]
) -> list[Condition]:
    """What to sample: the prompts that are given, or the classes; by default all that the adapter was trained on.

    Raises:
        UserError: prompts for a pipeline that takes classes, or the other way round, or a class that was not trained on.
    """
    kind = type(pipe)
    if not takes_class_labels(kind):
        if not prompts:
            raise UserError(f"prompts: not given: {kind.__name__} takes prompts, not classes")
        return [{"prompt": prompt} for prompt in prompts]
    if prompts:
        raise UserError(f"prompts: {kind.__name__} takes classes: say class_labels=...")
    trained = list(adapter.about["sampled"]["class_labels"])
    labels = trained if class_labels is None else list(class_labels)
    if not labels or not set(labels) <= set(trained):
        known = f"{trained[0]} to {trained[-1]}" if len(trained) == trained[-1] - trained[0] + 1 else str(trained)
        raise UserError(f"class_labels={labels}: name classes that the adapter was trained on: {known}")
    return [{"class_label": label} for label in labels]


def sample_setting(pipe: Any, adapter: GuidanceAdapter, setting: Setting, request: Request) -> Samples:
    """Sample one image per condition, its noise from its own seed, in the way that a setting says."""
    with undecoded(pipe) as latents, counted(denoiser_of(pipe)[1]) as count:
        if setting.method == ONE_PASS:
            adapter.attach(pipe)
        try:
            synchronize(pipe)
            start = time.perf_counter()
            sample(pipe, request, setting.guidance_scale)
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
