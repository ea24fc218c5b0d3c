"""Diffusion trajectories: the teacher's guided predictions at noised versions of its own samples.

Other guided distillation trains on these (arXiv 2210.03142, section 3.1: `z_t = alpha_t x + sigma_t eps`), and adapter
guidance distillation compares its guided trajectories with them (arXiv 2503.07274). The stock pipeline runs twice:
first for the samples, then with noised samples as its denoiser's input in place of the second run's latents. So the
schedule and the guidance rule stay the pipeline's own, and every step has a record, including the first.
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
    """Within the context, the list's one item is the result `[n, ...]` of the last step of a call for n samples.

    Raises:
        UserError: the denoiser's input is not the latents that the scheduler steps.
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
    """Within the context, each denoiser call gets clean latents, noised to the step's timestep, as its input.

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

    handle = denoiser.register_forward_pre_hook(
        hand, prepend=True, with_kwargs=True
    )  # before the recorder's hook, which must see the noised latents
    try:
        yield
    finally:
        handle.remove()


def noise_of(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Noise `[n, ...]` in float32; each sample's depends on its trajectory's seed and on the step alone."""
    sequences = (np.random.SeedSequence(seed, spawn_key=(step,)) for seed in seeds)
    derived = (int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)) for sequence in sequences)
    generators = [torch.Generator().manual_seed(seed) for seed in derived]
    return randn_tensor(like.shape, generators, like.device, torch.float32)


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The scheduler's own forward process, diffusion or flow matching; tensors `[n, ...]`, timesteps `[n]`."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timesteps, noise)
    return scheduler.add_noise(clean, noise, timesteps)


def as_input(scheduler: Any, latents: Tensor, timestep: Any, given: Tensor) -> Tensor:
    """Latents `[n, ...]` as a pipeline's denoiser gets them: scaled, and repeated to the batch size of `given`."""
    if hasattr(scheduler, "scale_model_input"):
        latents = scheduler.scale_model_input(latents, timestep)
    return torch.cat([latents] * (len(given) // len(latents))).to(given)


def check_noising(pipe: Any, layout: Layout, request: Request) -> None:
    """Check with a trial run that a pipeline can record diffusion trajectories.

    Raises:
        UserError: it cannot.
    """
    if not (hasattr(pipe.scheduler, "scale_noise") or hasattr(pipe.scheduler, "add_noise")):
        raise UserError(f"{type(pipe.scheduler).__name__}: adds no noise by itself: record with trajectory=guided")
    with undecoded(pipe), sampled(pipe, layout, 1):
        sample(pipe, request, PROBED_SCALES[0])
