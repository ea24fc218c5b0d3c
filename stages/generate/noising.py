"""Diffusion trajectories: the teacher guided at its own samples, noised, instead of on its way to them.

Other guided distillation trains on these (arXiv 2210.03142, section 3.1: `z_t = alpha_t x + sigma_t eps`), and adapter
guidance distillation compares its guided trajectories with them (arXiv 2503.07274). The stock pipeline runs twice: for
the samples, and again with its denoiser handed the noised ones in place of that run's latents. So the schedule and the
rule of guidance act as they are, and every step has its record, also the first, whose latents a pipeline draws itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stages.base.denoiser import denoiser_of, latent_name
from stages.base.hooks import Call, watch_steps
from stages.base.sampling import Request, sample, undecoded
from stages.errors import UserError
from stages.generate.layout import Layout
from stages.generate.probing import PROBED_SCALES, SAME, distance
from stages.generate.recorder import Recorder


@contextmanager
def sampled(pipe: Any, layout: Layout, n: int) -> Iterator[list[Tensor]]:
    """Within it, a call of `pipe` for n samples leaves the latents `[n, ...]` that its last step led to in the list.

    Raises:
        UserError: the denoiser is given something else than the latents that the scheduler steps.
    """
    latents: list[Tensor] = []

    def check(calls: list[Call], received: list[Tensor], timestep: Any) -> None:
        for given in (call.inputs[layout.arguments.latent] for call in calls if latents):
            if distance(given, as_input(pipe.scheduler, latents[0], timestep, given)) >= SAME:
                raise UserError(
                    f"{type(pipe).__name__}: its denoiser is given something else than the latents that its scheduler "
                    "steps: record with trajectory=guided"
                )

    def keep(stepped: Tensor) -> None:
        latents[:] = [layout.part(stepped, n)]

    with watch_steps(pipe, check, keep):
        yield latents


@contextmanager
def noised(pipe: Any, clean: Tensor, seeds: Sequence[int], recorder: Recorder) -> Iterator[None]:
    """Within it, each step's denoiser calls are handed clean latents, noised to the step's timestep.

    Args:
        clean: `[n, ...]`, as the scheduler of `pipe` steps them.
        seeds: of the n trajectories.
        recorder: of `pipe`, which counts the steps.
    """
    denoiser, scheduler = denoiser_of(pipe)[1], pipe.scheduler
    name, signature = latent_name(denoiser), inspect.signature(denoiser.forward)

    def hand(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        timestep = scheduler.timesteps[recorder.step]
        noise = noise_of(seeds, recorder.step, clean)
        latents = add_noise(scheduler, clean.float(), noise, timestep.expand(len(clean)))
        bound.arguments[name] = as_input(scheduler, latents, timestep, bound.arguments[name])
        return bound.args, bound.kwargs

    handle = denoiser.register_forward_pre_hook(hand, prepend=True, with_kwargs=True)  # the recorder must see its work
    try:
        yield
    finally:
        handle.remove()


def noise_of(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Noise `[n, ...]` in float32, each sample's from its trajectory's seed and the step alone."""
    sequences = (np.random.SeedSequence(seed, spawn_key=(step,)) for seed in seeds)
    derived = (int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)) for sequence in sequences)
    generators = [torch.Generator().manual_seed(seed) for seed in derived]
    return randn_tensor(like.shape, generators, like.device, torch.float32)


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The scheduler's own forward process, for diffusion or for flow matching; all `[n, ...]`, timesteps `[n]`."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timesteps, noise)
    return scheduler.add_noise(clean, noise, timesteps)


def as_input(scheduler: Any, latents: Tensor, timestep: Any, given: Tensor) -> Tensor:
    """Latents `[n, ...]` as a pipeline hands them to its denoiser: scaled, once for each part of the batch given."""
    if hasattr(scheduler, "scale_model_input"):
        latents = scheduler.scale_model_input(latents, timestep)
    return torch.cat([latents] * (len(given) // len(latents))).to(given)


def check_noising(pipe: Any, layout: Layout, request: Request) -> None:
    """Try a pipeline out on one condition.

    Raises:
        UserError: it cannot record diffusion trajectories.
    """
    if not (hasattr(pipe.scheduler, "scale_noise") or hasattr(pipe.scheduler, "add_noise")):
        raise UserError(f"{type(pipe.scheduler).__name__}: adds no noise by itself: record with trajectory=guided")
    with undecoded(pipe), sampled(pipe, layout, 1):
        sample(pipe, request, PROBED_SCALES[0])
