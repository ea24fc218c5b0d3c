from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.adapters.metadata import AdapterMetadata
from stages.base.denoiser import denoiser_of, latent_name
from stages.base.sampling import Request
from stages.errors import UserError
from stages.evaluate.comparisons import CFG, CFG_FIRST_50, CFG_FIRST_60, NONE, Samples, Setting, sample_setting
from stages.evaluate.first_steps import guided_first, select_rows
from stages.generate.finding import find_layout
from stages.train.student import unconditional_place
from tests.conftest import tiny_dit
from tests.pipelines_zoo.gathered import gather
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build

SCALE, STEPS = 3.0, 5
CONDITIONS = [{"class_label": 1}, {"class_label": 2}]


class AdapterStub:
    """The part of an adapter that the baselines need."""

    def __init__(self, place: dict[str, int] | None) -> None:
        self.metadata = AdapterMetadata(conditions={}, scale_range=[1.0, 1.0], unconditional=place)


def placed(pipe: Any, request: Request) -> Any:
    return AdapterStub(unconditional_place(find_layout(pipe, request)))


@contextmanager
def conditional_twice(pipe: Any, place: dict[str, int], guided: int) -> Iterator[None]:
    """The reference: run everything, and overwrite the unconditional prediction from a step on."""
    denoiser = denoiser_of(pipe)[1]
    kept: list[Any] = []
    calls = 0

    def overwrite(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal calls
        step, calls = calls // (1 if place["chunks"] == 2 else 2), calls + 1
        prediction = output[0] if isinstance(output, tuple) else output.sample
        if step < guided:
            return None
        if place["chunks"] == 2:
            conditional = prediction.chunk(2)[1 - place["chunk"]]
            prediction.copy_(torch.cat([conditional, conditional]))
        elif calls % 2:
            kept[:] = [prediction.clone()]
        else:
            prediction.copy_(kept[0])
        return output

    handle = denoiser.register_forward_hook(overwrite, with_kwargs=True)
    with torch.no_grad():
        yield
    handle.remove()


def states(samples: Samples) -> list[Tensor]:
    return [*(step.latents for step in samples.steps), samples.latents]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_guided_first_and_then_runs_conditional_passes(family: str) -> None:
    pipe = build(family)
    request = Request([{"prompt": prompt} for prompt in PROMPTS], [0, 1], STEPS, ARGUMENTS.get(family, {}))
    stub = placed(pipe, request)
    place = stub.metadata.unconditional
    guided = sample_setting(pipe, stub, Setting(CFG, SCALE), request)
    first = sample_setting(pipe, stub, Setting(CFG_FIRST_50, SCALE), request)
    with conditional_twice(pipe, place, guided=3):
        reference = sample_setting(pipe, stub, Setting(CFG, SCALE), request)
    total = len(guided.steps)
    assert first.denoiser_evaluations == 2 * (total + 3)  # ceil(50% of 5) steps twice for each of 2 images
    for state, like in zip(states(first)[:4], states(guided)[:4], strict=True):
        torch.testing.assert_close(state, like)
    for state, like in zip(states(first), states(reference), strict=True):
        torch.testing.assert_close(state, like, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(first.latents, guided.latents, atol=1e-2)
    assert "forward" not in vars(denoiser_of(pipe)[1])
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize(
    ("method", "steps", "guided"), [(CFG_FIRST_50, 4, 2), (CFG_FIRST_50, 5, 3), (CFG_FIRST_60, 5, 3)]
)
def test_the_later_steps_are_those_without_guidance(method: str, steps: int, guided: int) -> None:
    """Computed by hand: DDIM steps with the conditional prediction, from the state after the guided steps."""
    pipe, request = tiny_dit(), Request(CONDITIONS, [0, 1], steps, {})
    stub = placed(pipe, request)
    cfg, first = (sample_setting(pipe, stub, Setting(name, SCALE), request) for name in (CFG, method))
    assert first.denoiser_evaluations == 2 * (steps + guided)
    latents = cfg.steps[guided].latents
    torch.testing.assert_close(first.steps[guided].latents, latents)
    labels = torch.tensor([condition["class_label"] for condition in CONDITIONS])
    for i in range(guided, steps):
        torch.testing.assert_close(first.steps[i].latents, latents, atol=1e-5, rtol=1e-5)
        t = pipe.scheduler.timesteps[i]
        with torch.no_grad():
            prediction = pipe.transformer(latents, timestep=t.expand(2), class_labels=labels).sample
        latents = pipe.scheduler.step(prediction, t, latents).prev_sample
    torch.testing.assert_close(first.latents, latents / pipe.vae.config.scaling_factor, atol=1e-5, rtol=1e-5)


def test_a_scheduler_that_asks_twice_per_step_is_guided_on_half_of_its_calls() -> None:
    from diffusers import HeunDiscreteScheduler

    pipe = build("stable_diffusion")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    request = Request([{"prompt": PROMPTS[0]}], [0], 4, {})
    stub = placed(pipe, replace(request))
    evaluations = {
        method: sample_setting(pipe, stub, Setting(method, scale), request).denoiser_evaluations
        for method, scale in ((NONE, 1.0), (CFG, SCALE), (CFG_FIRST_50, SCALE))
    }
    assert evaluations == {NONE: 7, CFG: 14, CFG_FIRST_50: 7 + 4}


def test_a_batch_that_is_not_doubled_is_unchanged() -> None:
    pipe, request = tiny_dit(), Request(CONDITIONS, [0, 1], 4, {})
    stub = placed(pipe, request)
    none, first = (sample_setting(pipe, stub, Setting(name, 1.0), request) for name in (NONE, CFG_FIRST_50))
    assert torch.equal(none.latents, first.latents)
    assert none.denoiser_evaluations == first.denoiser_evaluations


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (None, "unknown"),
        ({"call": 0, "chunk": 0, "chunks": 3}, "3 parts, not two"),
        ({"call": 0, "chunk": 0, "chunks": 1}, "unconditional part first"),
    ],
)
def test_an_unknown_or_late_conditional_part_is_refused(place: dict[str, int] | None, message: str) -> None:
    pipe: Any = tiny_dit()
    with (
        pytest.raises(UserError, match=f"DiTPipeline: .*{message}.*leave cfg_first_50"),
        guided_first(pipe, place, 50, [], 2),
    ):
        pass


def test_rows_are_selected_in_nested_arguments() -> None:
    four, three = torch.arange(4), torch.arange(3)
    given = {"a": {"b": four, "c": None}, "d": (four, three), "e": torch.tensor(4), "f": "four"}
    found = select_rows(given, 4, slice(2, 4))
    assert found["a"]["b"].tolist() == found["d"][0].tolist() == [2, 3]
    assert found["d"][1].tolist() == [0, 1, 2]
    assert (found["a"]["c"], int(found["e"]), found["f"]) == (None, 4, "four")


def test_the_denoiser_keeps_its_signature() -> None:
    pipe: Any = tiny_dit()
    before = inspect.signature(pipe.transformer.forward)
    with guided_first(pipe, {"call": 0, "chunk": 1, "chunks": 2}, 50, [], 2):
        assert inspect.signature(pipe.transformer.forward) == before
        assert latent_name(pipe.transformer) == "hidden_states"


def test_guidance_ends_for_every_denoiser_of_a_pipeline() -> None:
    """Wan 2.2 continues with its second denoiser after CFG on the first steps has ended."""
    specimen = gather()["WanPipeline (2.2)"]
    pipe = specimen.build()
    request = Request(list(specimen.conditions), [0, 1], 4, dict(specimen.arguments))
    adapter: Any = AdapterStub({"call": 1, "chunk": 0, "chunks": 1})
    whole, half = (sample_setting(pipe, adapter, Setting(method, 3.0), request) for method in (CFG, CFG_FIRST_50))
    assert (whole.denoiser_evaluations, half.denoiser_evaluations) == (2 * 4 * 2, (2 * 2 + 2) * 2)
