"""The dial: the effective guidance scale of an exported LoRA at each strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.base.denoiser import denoiser_of
from stages.base.sampling import Condition, Request, noise_seeds
from stages.evaluate.comparisons import Setting, arguments_of, sample_setting
from stages.evaluate.effective_scale import effective_scale, squared_distances
from stages.evaluate.methods import CFG, NONE
from stages.evaluate.threads import threads_that_pay

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
HIGHEST_CFG = 1.5  # CFG is measured up to the scale of this strength, if strength scaled guidance linearly


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
    """Measure the effective guidance scale of a one-scale LoRA at each of `STRENGTHS`.

    The pipeline samples each strength in a single pass with weights `W + strength * dW`. The samples are compared with
    CFG from the same noise, at scales from 1 to beyond the LoRA's; the highest of these is the maximum result.

    Args:
        pipe: a pipeline whose denoiser has no adapter.
        adapter: an adapter that is not attached; it is detached again at the end.
        guidance_scale: the LoRA's scale, above 1.
        conditions: taken in turn.

    Returns:
        A row per strength, ascending: `strength` and `guidance_scale`.

    Raises:
        UserError: the adapter cannot be fused into the base.
    """
    scales = [1 + share * (guidance_scale - 1) for share in (0.0, *STRENGTHS, HIGHEST_CFG)]
    sums = torch.zeros(len(STRENGTHS) + len(scales), len(scales), dtype=torch.float64)
    for start in range(0, num_samples, batch_size):
        indices = range(start, min(start + batch_size, num_samples))
        batch = [conditions[i % len(conditions)] for i in indices]
        seeds = noise_seeds(seed, indices)
        request = Request(batch, seeds, num_inference_steps, arguments_of(pipe, adapter))
        with threads_that_pay(pipe):
            at_strengths = [
                sample_at_strength(pipe, adapter, guidance_scale, strength, request) for strength in STRENGTHS
            ]
            measured = [sample_cfg(pipe, adapter, scale, request) for scale in scales]
        sums += torch.stack(
            [squared_distances(latents, measured).sum(dim=0).cpu() for latents in at_strengths + measured]
        )
    distances = (sums / num_samples).tolist()
    between = [row[i + 1] for i, row in enumerate(distances[len(STRENGTHS) : -1])]
    return [
        {"strength": strength, "guidance_scale": effective_scale(found, between, scales)}
        for strength, found in zip(STRENGTHS, distances, strict=False)
    ]


def sample_at_strength(
    pipe: Any, adapter: GuidanceAdapter, guidance_scale: float, strength: float, request: Request
) -> Tensor:
    """Final latents `[n, ...]` of a single pass with one scale's change, times the strength, in the weights."""
    adapter.attach(denoiser_of(pipe)[1])
    try:
        adapter.fuse(guidance_scale, strength)
        return sample_setting(pipe, adapter, Setting(NONE, 1.0), request).latents
    finally:
        adapter.detach()


def sample_cfg(pipe: Any, adapter: GuidanceAdapter, guidance_scale: float, request: Request) -> Tensor:
    """Final latents `[n, ...]` of the base with CFG; at scale 1 without guidance."""
    method = CFG if guidance_scale > 1 else NONE
    return sample_setting(pipe, adapter, Setting(method, guidance_scale), request).latents
