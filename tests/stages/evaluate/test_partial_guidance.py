from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, ModularPipeline, StableDiffusionImg2ImgPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from stages.adapters.metadata import AdapterMetadata
from stages.base.denoiser import denoiser_of, latent_name
from stages.base.hooks import scheduler_steps
from stages.base.sampling import Request
from stages.errors import UserError
from stages.evaluate.comparisons import Samples, Setting, sample_setting
from stages.evaluate.methods import CFG, CFG_FIRST_50, CFG_FIRST_60, NONE
from stages.evaluate.partial_guidance import partly_guided, predictions_in, select_rows, with_predictions
from stages.evaluate.rules import Agreement, FirstSteps, agreement
from stages.generate.finding import find_layout
from stages.train.student import unconditional_place
from tests.conftest import tiny_dit
from tests.pipelines_zoo.gathered import gather
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build, save

SCALE, STEPS = 3.0, 5
CONDITIONS = [{"class_label": 1}, {"class_label": 2}]
IN_ONE_CALL = {"call": 0, "chunk": 1, "chunks": 2}


class AdapterStub:
    """The part of an adapter that the baselines need."""

    def __init__(self, place: dict[str, int] | None, **facts: Any) -> None:
        self.metadata = metadata_of(place, **facts)


def metadata_of(place: dict[str, int] | None, **facts: Any) -> AdapterMetadata:
    return AdapterMetadata(conditions={}, scale_range=[1.0, 1.0], unconditional=place, **facts)


def placed(pipe: Any, request: Request) -> Any:
    layout = find_layout(pipe, request)
    facts = {name: getattr(layout, name) for name in ("timestep_scale", "timestep_offset")}
    return AdapterStub(unconditional_place(layout), timestep=layout.arguments.timestep, **facts)


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


def test_a_scheduler_that_asks_twice_per_step_is_guided_at_both_calls_of_a_timestep() -> None:
    """Heun's four steps make seven calls: one at the first timestep, two at each of the others."""
    pipe = build("stable_diffusion")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    request = Request([{"prompt": PROMPTS[0]}], [0], 4, {})
    stub = placed(pipe, replace(request))
    expected = {NONE: 7, CFG: 14, CFG_FIRST_50: 7 + 4, "cfg_interval_25_75": 7 + 2 * 2, "cfg_every_2": 7 + 1 + 2}
    evaluations = {
        method: sample_setting(pipe, stub, Setting(method, 1.0 if method == NONE else SCALE), request)
        for method in expected
    }
    assert {method: samples.denoiser_evaluations for method, samples in evaluations.items()} == expected


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
        partly_guided(pipe, metadata_of(place), CFG_FIRST_50, FirstSteps(50), [], 2),
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
    with partly_guided(pipe, metadata_of(IN_ONE_CALL), CFG_FIRST_50, FirstSteps(50), [], 2):
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


# What the limits of a method's numbers equal, exactly.
LIMITS = {"cfg_interval_0_100": CFG, "cfg_adaptive_1": CFG, "cfg_every_1": CFG, "cfg_interval_50_51": NONE}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limits_of_every_method_are_cfg_and_no_guidance(family: str) -> None:
    pipe = build(family)
    request = Request([{"prompt": prompt} for prompt in PROMPTS], [0, 1], 4, ARGUMENTS.get(family, {}))
    stub = placed(pipe, request)
    ends = {NONE: sample_setting(pipe, stub, Setting(NONE, 1.0), request)}
    ends[CFG] = sample_setting(pipe, stub, Setting(CFG, SCALE), request)
    for method, same in LIMITS.items():
        found = sample_setting(pipe, stub, Setting(method, SCALE), request)
        assert found.denoiser_evaluations == ends[same].denoiser_evaluations, method
        for state, like in zip(states(found), states(ends[same]), strict=True):
            torch.testing.assert_close(state, like, atol=0 if same == CFG else 1e-4, rtol=0 if same == CFG else 1e-4)


@pytest.mark.parametrize("family", ["class", "stable_diffusion", "wan"])
def test_each_image_of_a_batch_is_guided_until_its_own_predictions_agree(family: str) -> None:
    """One by one, the images cost as much and come out the same; together they end at different steps."""
    pipe, conditions, seeds, request = three_images(family)
    stub = placed(pipe, replace(request, conditions=conditions[:2], seeds=seeds[:2]))
    threshold = between(pipe, stub, request)
    setting = Setting(f"cfg_adaptive_{threshold:.6f}", SCALE)
    together = sample_setting(pipe, stub, setting, request)
    alone = [
        sample_setting(pipe, stub, setting, replace(request, conditions=conditions[i : i + 1], seeds=[seeds[i]]))
        for i in range(3)
    ]
    costs = [samples.denoiser_evaluations for samples in alone]
    assert together.denoiser_evaluations == sum(costs)
    assert len(set(costs)) > 1
    assert STEPS < min(costs) < max(costs) <= 2 * STEPS
    torch.testing.assert_close(
        together.latents, torch.cat([samples.latents for samples in alone]), atol=2e-3, rtol=2e-3
    )


def three_images(family: str) -> tuple[Any, list[dict[str, Any]], list[int], Request]:
    if family == "class":
        pipe, conditions = tiny_dit(), [{"class_label": label} for label in (1, 2, 7)]
    else:
        pipe, conditions = build(family), [{"prompt": prompt} for prompt in (*PROMPTS, "seven")]
    seeds = [0, 1, 2]
    return pipe, conditions, seeds, Request(conditions, seeds, STEPS, ARGUMENTS.get(family, {}))


def between(pipe: Any, stub: Any, request: Request) -> float:
    """A threshold that the predictions of some images exceed earlier than those of others, in guided sampling."""
    alike: list[Tensor] = []

    class Watching(Agreement):
        def see(self, latents: Tensor, conditional: Tensor, unconditional: Tensor, images: list[int]) -> None:
            alike.append(agreement(latents, conditional, unconditional))

    with (
        scheduler_steps(pipe, 3) as steps,
        partly_guided(pipe, stub.metadata, "cfg_adaptive_2", Watching(2.0), steps, 3),
    ):
        sample_setting(pipe, stub, Setting(CFG, SCALE), request)
    first = torch.stack(alike)[: STEPS - 1].cummax(0).values  # [steps, images]
    values = first[1].sort().values
    return float(values[:2].mean())


def test_the_last_difference_is_applied_between_the_guided_steps() -> None:
    """Computed by hand, with every second step guided: DDIM steps with `c + (w - 1) d`."""
    pipe, request = tiny_dit(), Request(CONDITIONS, [0, 1], 4, {})
    found = sample_setting(pipe, placed(pipe, request), Setting("cfg_every_2", SCALE), request)
    assert found.denoiser_evaluations == 2 * (4 + 2)
    latents, labels = found.steps[0].latents, torch.tensor([1, 2, 1000, 1000])
    for i in range(4):
        torch.testing.assert_close(found.steps[i].latents, latents, atol=1e-5, rtol=1e-5)
        t = pipe.scheduler.timesteps[i]
        with torch.no_grad():
            both = pipe.transformer(torch.cat([latents] * 2), timestep=t.expand(4), class_labels=labels).sample
        c, u = both.chunk(2)
        if i % 2 == 0:
            difference = c - u
        latents = pipe.scheduler.step(c + (SCALE - 1) * difference, t, latents).prev_sample
    torch.testing.assert_close(found.latents, latents / pipe.vae.config.scaling_factor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("interval", "guided"), [("20_80", (1, 4)), ("0_50", (0, 2)), ("55_74", (2, 3)), ("90_100", (4, 5))]
)
def test_an_interval_is_rounded_down_as_in_guiders_of_diffusers(interval: str, guided: tuple[int, int]) -> None:
    pipe, request = tiny_dit(), Request(CONDITIONS, [0, 1], STEPS, {})
    stub = placed(pipe, request)
    found = sample_setting(pipe, stub, Setting(f"cfg_interval_{interval}", SCALE), request)
    assert found.denoiser_evaluations == 2 * (STEPS + guided[1] - guided[0])
    none = sample_setting(pipe, stub, Setting(NONE, 1.0), request)
    same = [torch.equal(a, b) for a, b in zip(states(found), states(none), strict=True)]
    assert same == [number <= guided[0] for number in range(STEPS + 1)]


def test_a_pipeline_that_begins_with_a_picture_counts_the_timesteps_that_it_leaves_out() -> None:
    pipe = StableDiffusionImg2ImgPipeline(**build("stable_diffusion").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    stub: Any = AdapterStub({"call": 0, "chunk": 0, "chunks": 2})
    picture = {"image": torch.rand(2, 3, 32, 32), "strength": 0.5}
    request = Request([{"prompt": prompt} for prompt in PROMPTS], [0, 1], 8, picture)  # the last 4 timesteps of 8
    methods = {"cfg_interval_0_50": 0, "cfg_interval_50_75": 2, "cfg_every_3": 2, "cfg_first_50": 2, "cfg_first_30": 2}
    for method, guided in methods.items():
        found = sample_setting(pipe, stub, Setting(method, SCALE), request)
        assert found.denoiser_evaluations == 2 * (4 + guided), method


def test_a_modular_pipeline_costs_one_pass_where_it_is_not_guided(tmp_path: Path) -> None:
    pipe = ModularPipeline.from_pretrained(str(save("stable_diffusion_xl", tmp_path)))
    pipe.load_components(torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    request = Request([{"prompt": prompt} for prompt in PROMPTS], [0, 1], 4, {})
    stub = placed(pipe, request)
    cfg = sample_setting(pipe, stub, Setting(CFG, SCALE), request)
    for method, guided in {"cfg_interval_25_75": 2, "cfg_every_2": 2, "cfg_adaptive_1": 4}.items():
        found = sample_setting(pipe, stub, Setting(method, SCALE), request)
        assert found.denoiser_evaluations == 2 * (4 + guided), method
        assert torch.equal(found.latents, cfg.latents) == (guided == 4)


def test_a_call_with_other_samples_than_one_or_two_per_image_is_refused() -> None:
    pipe, request = tiny_dit(), Request(CONDITIONS, [0, 1], 2, {})
    with (
        pytest.raises(UserError, match="gets 4 samples for 3 images.*leave cfg_first_50 out"),
        partly_guided(pipe, metadata_of(IN_ONE_CALL), CFG_FIRST_50, FirstSteps(50), [], 3),
    ):
        sample_setting(pipe, placed_in_one_call(), Setting(CFG, SCALE), request)


def placed_in_one_call() -> Any:
    return AdapterStub(IN_ONE_CALL)


def test_predictions_are_found_and_replaced_in_outputs_of_every_form() -> None:
    one, other = torch.arange(6.0).view(3, 2), torch.zeros(4)
    for output in (
        one,
        (one, other),
        Transformer2DModelOutput(sample=one),
        (list(one),),  # one tensor per sample
    ):
        (found,) = predictions_in(output, 3)
        assert torch.equal(found, one)
        doubled = with_predictions(output, 3, [torch.cat([one, one])])
        assert type(doubled) is type(output)
        (found,) = predictions_in(doubled, 6)
        assert torch.equal(found, torch.cat([one, one]))
