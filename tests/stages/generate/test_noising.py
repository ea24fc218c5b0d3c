"""Diffusion trajectories of every family: noised samples of the untouched pipeline, with its guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import IPNDMScheduler
from torch import Tensor
from torch.nn import functional

from stages.base.arguments import Caller
from stages.base.denoiser import as_target, denoiser_of, predictions_of
from stages.base.hooks import Call, watch_steps
from stages.base.sampling import Request, sample, undecoded
from stages.errors import UserError
from stages.generate.finding import find_layout
from stages.generate.layout import Layout, Pass
from stages.generate.noising import check_noising, noise_of, noised, sampled
from stages.generate.recorder import Recording, record
from stages.generate.scale import PerSampleScale
from stages.generate.timesteps import shifted_timesteps
from tests.conftest import tiny_dit
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build

SCALES, SEEDS, STEPS, SHIFT = (3.0, 7.0), (4, 5), 4, 0.4


@pytest.fixture(scope="module", params=["dit", "dit_with_variance", *FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: str) -> Any:
    return tiny_dit(8 if family == "dit_with_variance" else 4) if family.startswith("dit") else build(family)


def ask(family: str, *places: int) -> Request:
    conditions = [{"class_label": 2 + i} if family.startswith("dit") else {"prompt": PROMPTS[i]} for i in places]
    return Request(conditions, [SEEDS[i] for i in places], STEPS, ARGUMENTS.get(family, {}))


@pytest.fixture(scope="module")
def layout(pipe: Any, family: str) -> Layout:
    found = find_layout(pipe, ask(family, 0))
    check_noising(pipe, found, ask(family, 0))
    return found


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Run on a shifted grid within the context, without decoding."""
    with undecoded(pipe), shifted_timesteps(pipe.scheduler, SHIFT):
        yield


def recorded(pipe: Any, layout: Layout, request: Request, scale: float) -> tuple[Recording, list[tuple[Any, Tensor]]]:
    """Record a diffusion trajectory of each condition; return the recording and (calls, prediction) of each step."""
    n, steps = len(request.seeds), []
    with quiet(pipe):
        with sampled(pipe, layout, n) as clean:
            sample(pipe, request, scale)
        with record(pipe, layout, n) as recorder, noised(pipe, clean[0], request.seeds, recorder):
            see_step = recorder.see_step

            def see(calls: list[Call], received: list[Tensor]) -> None:
                steps.append((calls, received[0]))
                see_step(calls, received)

            recorder.see_step = see  # type: ignore[method-assign]
            sample(pipe, request, scale)
    return recorder.recording(), steps


@pytest.fixture(scope="module")
def mixed(pipe: Any, family: str, layout: Layout) -> tuple[Recording, list[tuple[Any, Tensor]]]:
    """Record two conditions at two scales in one batch."""
    return recorded(pipe, layout, ask(family, 0, 1), PerSampleScale(torch.tensor(SCALES)))


def clean_alone(pipe: Any, layout: Layout, request: Request, scale: float) -> Tensor:
    """Return the result of the untouched pipeline's last step, for one condition."""
    latents: list[Tensor] = []
    with quiet(pipe), watch_steps(pipe, lambda *_: None, latents.append):
        sample(pipe, request, scale)
    return layout.part(latents[-1], 1)[0]


def noised_by_hand(scheduler: Any, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """Return a denoiser's input for a noisy latent; both kinds of diffusion schedules agree there."""
    if "Flow" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        sigma = float(scheduler.sigmas[step])
        return (1 - sigma) * clean + sigma * noise
    table = scheduler.alphas_cumprod.double().numpy()
    sigma = np.interp(float(scheduler.timesteps[step]), np.arange(len(table)), ((1 - table) / table) ** 0.5)
    return (clean + sigma * noise) / (1 + sigma**2) ** 0.5


def test_latents_are_the_pipelines_own_noised_samples(
    pipe: Any, family: str, layout: Layout, mixed: tuple[Recording, Any]
) -> None:
    recording, _ = mixed
    assert len(recording.latent) == 2 * STEPS
    for i, (seed, scale) in enumerate(zip(SEEDS, SCALES, strict=True)):
        clean = clean_alone(pipe, layout, ask(family, i), scale)
        own = recording.owner == i
        for step, latent in enumerate(recording.latent[own]):
            derived = np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1, np.uint64)[0] >> np.uint64(1)
            noise = torch.randn(1, *clean.shape, generator=torch.Generator().manual_seed(int(derived)))[0]
            expected = noised_by_hand(pipe.scheduler, clean, noise, step)
            torch.testing.assert_close(latent, expected, atol=1e-3, rtol=1e-3)
        timestep = recording.timestep[own] / layout.timestep_scale
        torch.testing.assert_close(timestep.double(), pipe.scheduler.timesteps.double(), atol=1e-3, rtol=1e-3)


def predictions(denoiser: Any, layout: Layout, seen: Pass) -> Tensor:
    """Return the guided channels of a separate pass for these inputs."""
    caller = Caller(layout.arguments, torch.device("cpu"))
    with torch.no_grad():
        output = denoiser(**caller.nested(seen.latent, seen.timestep, seen.cond), return_dict=False)
    return as_target(predictions_of(output), layout.target_channels)


def test_targets_equal_guidance_computed_at_these_latents(
    pipe: Any, family: str, layout: Layout, mixed: tuple[Recording, list[tuple[Any, Tensor]]]
) -> None:
    recording, steps = mixed
    denoiser = denoiser_of(pipe)[1]
    null = replace(layout, call=layout.calls - 1 - layout.call, chunk=layout.chunks - 1 - layout.chunk)
    for step, (calls, _) in enumerate(steps):
        own = recording.step == step
        conditional, unconditional = (each.conditional(calls, 2) for each in (layout, null))
        assert torch.equal(conditional.latent, recording.latent[own])
        assert torch.equal(unconditional.latent, recording.latent[own])
        c, u = (predictions(denoiser, layout, seen) for seen in (conditional, unconditional))
        g = u + torch.tensor(SCALES).view(2, *[1] * (c.ndim - 1)) * (c - u)
        if family == "qwen_image":  # keeps the norm of the conditional prediction, token by token
            g = g * c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(recording.target[own], g, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(c, u, atol=1e-3)
        cosine = functional.cosine_similarity(c.flatten(1), g.flatten(1))
        torch.testing.assert_close(recording.guidance_cosine[own], cosine, atol=1e-5, rtol=0)
        moved = (g - c).square().flatten(1).mean(1)
        torch.testing.assert_close(recording.guidance_delta[own], moved, atol=1e-9, rtol=1e-3)


def test_scales_of_one_batch_equal_separate_runs(
    pipe: Any, family: str, layout: Layout, mixed: tuple[Recording, Any]
) -> None:
    recording, _ = mixed
    for i, scale in enumerate(SCALES):
        alone, _ = recorded(pipe, layout, ask(family, i), scale)
        own = recording.owner == i
        for name in ("latent", "target", "timestep"):
            torch.testing.assert_close(getattr(recording, name)[own], getattr(alone, name), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(recording.guidance_cosine[own], alone.guidance_cosine, atol=1e-4, rtol=0)
        torch.testing.assert_close(recording.guidance_delta[own], alone.guidance_delta, atol=1e-8, rtol=1e-2)


def test_the_pipeline_is_unchanged_afterwards(pipe: Any, family: str, layout: Layout) -> None:
    before = clean_alone(pipe, layout, ask(family, 0), 3.0)
    recorded(pipe, layout, ask(family, 0), 3.0)
    assert torch.equal(clean_alone(pipe, layout, ask(family, 0), 3.0), before)
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
    assert not denoiser_of(pipe)[1]._forward_pre_hooks


def test_noise_depends_on_the_seed_and_the_step_alone() -> None:
    like = torch.zeros(3, 4, 8, 8, dtype=torch.float16)
    together = noise_of([1, 2, 2**62], 3, like)
    assert together.dtype == torch.float32
    for i, seed in enumerate([1, 2, 2**62]):
        assert torch.equal(noise_of([seed], 3, like[:1])[0], together[i])
    initial = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    everything = [together, noise_of([1], 4, like[:1]), noise_of([1], 0, like[:1]), initial]
    assert len({tensor.sum().item() for part in everything for tensor in part}) == 6


def test_a_scheduler_that_cannot_noise_is_refused() -> None:
    pipe = tiny_dit()
    pipe.scheduler = IPNDMScheduler()
    layout = find_layout(pipe, ask("dit", 0))
    with pytest.raises(UserError, match="IPNDMScheduler: adds no noise by itself: record with trajectory=guided"):
        check_noising(pipe, layout, ask("dit", 0))


def test_a_denoiser_with_other_inputs_than_noised_latents_is_refused() -> None:
    pipe = tiny_dit()

    def shrink(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (0.9 * args[0], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": 0.9 * kwargs["hidden_states"]}

    pipe.transformer.register_forward_pre_hook(shrink, with_kwargs=True)
    layout = find_layout(pipe, ask("dit", 0))
    with pytest.raises(UserError, match="DiTPipeline: its denoiser is given something else .*trajectory=guided"):
        check_noising(pipe, layout, ask("dit", 0))
