"""The dial: what turning the strength of an exported LoRA does, told as the guidance scale that its samples show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.base.denoiser import denoiser_of
from stages.base.sampling import Condition, Request
from stages.evaluate.comparisons import CFG, NONE, Setting, arguments_of, sample_setting
from stages.evaluate.effective_scale import effective_scale, squared_distances
from stages.evaluate.threads import threads_that_pay

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
BEYOND = 1.5  # where CFG is measured last: the scale that this strength would mean, did the strength scale the guidance


def measure_dial(
    pipe: Any,
    adapter: GuidanceAdapter,
    guidance_scale: float,
    conditions: Sequence[Condition],
    num_samples: int = 64,
    num_inference_steps: int = 25,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, float]]:
    """The effective guidance scale of a file that holds one scale, at each of some strengths.

    Each strength is sampled by the pipeline's own single pass, with `W + strength * dW` for weights, and set beside CFG from the
    same noise, at scales from no guidance to beyond the file's; those beyond the last are told as the last.

    Args:
        pipe: nothing rides on its denoiser; adapter: attached to nothing; both are left so.
        guidance_scale: of the file, above 1; conditions: taken in turn.

    Returns:
        A row per strength, rising: `strength` and `guidance_scale`.

    Raises:
        UserError: the adapter, or the base as it is, cannot be fused.
    """
    scales = [1 + share * (guidance_scale - 1) for share in (0.0, *STRENGTHS, BEYOND)]
    sums = torch.zeros(len(STRENGTHS) + len(scales), len(scales), dtype=torch.float64)
    for start in range(0, num_samples, batch_size):
        indices = range(start, min(start + batch_size, num_samples))
        asked = [conditions[i % len(conditions)] for i in indices]
        seeds = [(seed << 32) + i for i in indices]
        request = Request(asked, seeds, num_inference_steps, arguments_of(pipe, adapter))
        with threads_that_pay(pipe):
            turned = [of_strength(pipe, adapter, guidance_scale, strength, request) for strength in STRENGTHS]
            measured = [of_cfg(pipe, adapter, scale, request) for scale in scales]
        sums += torch.stack([squared_distances(latents, measured).sum(dim=0).cpu() for latents in turned + measured])
    distances = (sums / num_samples).tolist()
    between = [of_scale[i + 1] for i, of_scale in enumerate(distances[len(STRENGTHS) : -1])]
    return [
        {"strength": strength, "guidance_scale": effective_scale(found, between, scales)}
        for strength, found in zip(STRENGTHS, distances, strict=False)
    ]


def of_strength(
    pipe: Any, adapter: GuidanceAdapter, guidance_scale: float, strength: float, request: Request
) -> Tensor:
    """Final latents `[n, ...]` of the pipeline's own single pass with one scale in its weights, so many times."""
    adapter.attach(denoiser_of(pipe)[1])
    try:
        adapter.fuse(guidance_scale, strength)
        return sample_setting(pipe, adapter, Setting(NONE, 1.0), request).latents
    finally:
        adapter.detach()


def of_cfg(pipe: Any, adapter: GuidanceAdapter, guidance_scale: float, request: Request) -> Tensor:
    """Final latents `[n, ...]` of the base alone; at scale 1 without guidance."""
    method = CFG if guidance_scale > 1 else NONE
    return sample_setting(pipe, adapter, Setting(method, guidance_scale), request).latents
