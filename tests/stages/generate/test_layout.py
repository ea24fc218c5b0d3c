from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ModularPipeline,
    StableDiffusionPAGPipeline,
)
from torch import Tensor
from torch.nn import functional

from stages.base.arguments import Arguments, Axis, Caller, encoded
from stages.base.denoiser import denoiser_of
from stages.base.hooks import Call, watch_steps
from stages.base.patching import patched
from stages.base.sampling import Request, sample, undecoded
from stages.errors import UserError
from stages.generate.finding import find_layout, place_conditional
from stages.generate.layout import Layout
from stages.generate.probing import has_rows, probe, rows_by_step
from stages.generate.recorder import Recording, record
from stages.generate.sample_axes import find_arguments
from stages.generate.scale import PerSampleScale
from stages.generate.unguided import guidance_rule, without_guidance
from stages.records.teacher import LayoutFacts
from stages.storage.fields import read_fields
from tests.conftest import tiny_dit
from tests.support.families import PROMPTS, build, save

SCALES, STEPS = (3.0, 7.0), 4
TOLERANCE = 1e-4


def ask(*places: int, **arguments: Any) -> Request:
    return Request([{"prompt": PROMPTS[i]} for i in places], list(places), STEPS, arguments)


def targets_alone(pipe: Any, request: Request, scale: float) -> Tensor:
    """Return the scheduler inputs `[steps, c, h, w]` of the untouched pipeline, for one prompt."""
    seen: list[Tensor] = []
    with undecoded(pipe), watch_steps(pipe, lambda _, received, t: seen.append(received[0][0])):
        sample(pipe, request, scale)
    return torch.stack(seen)


@torch.no_grad()
def conditional_alone(pipe: Any, layout: Layout, recording: Recording) -> Tensor:
    """Return the untouched denoiser's prediction for the recorded inputs `[m, ...]`, in a separate pass."""
    cond = {name: value[recording.owner] for name, value in recording.cond.items()}
    caller = Caller(layout.arguments, torch.device("cpu"))
    return denoiser_of(pipe)[1](**caller.nested(recording.latent, recording.timestep, cond), return_dict=False)[0]


def pag() -> Any:
    pipe = StableDiffusionPAGPipeline(**build("stable_diffusion").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def modular(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = ModularPipeline.from_pretrained(str(save("stable_diffusion_xl", tmp_path_factory.mktemp("modular"))))
    pipe.load_components(torch_dtype=torch.float32)
    return pipe


RULES = ["rescaled", "pag", "apg", "zero_star"]


@pytest.fixture(params=RULES)
def guided(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(a pipeline, its call arguments, the guidance rule expected in `dataset.json`)."""
    match request.param:
        case "rescaled":
            return build("stable_diffusion"), {"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}
        case "pag":
            return pag(), {"pag_scale": 2.0}, {"pipeline": "StableDiffusionPAGPipeline", "pag_scale": 2.0}
        case "apg":
            pipe, guider = request.getfixturevalue("modular"), AdaptiveProjectedGuidance(eta=0.3)
            rule = {"name": "AdaptiveProjectedGuidance", "eta": 0.3}
        case _:
            pipe, guider = request.getfixturevalue("modular"), ClassifierFreeZeroStarGuidance(zero_init_steps=1)
            rule = {"name": "ClassifierFreeZeroStarGuidance", "zero_init_steps": 1}
    pipe.update_components(guider=guider)
    return pipe, {}, rule


def test_any_rule_is_recorded_by_its_effect_with_a_scale_per_sample(guided: Any) -> None:
    pipe, arguments, rule = guided
    layout = find_layout(pipe, ask(0, **arguments))
    assert layout.scale_per_sample
    with undecoded(pipe), record(pipe, layout, 2) as recorder:
        sample(pipe, ask(0, 1, **arguments), PerSampleScale(torch.tensor(SCALES)))
    recording = recorder.recording()
    c = conditional_alone(pipe, layout, recording)
    moved = (recording.target - c).square().mean((1, 2, 3))
    torch.testing.assert_close(recording.guidance_delta, moved, atol=1e-9, rtol=1e-3)
    similarity = functional.cosine_similarity(c.flatten(1), recording.target.flatten(1))
    torch.testing.assert_close(recording.guidance_cosine, similarity, atol=1e-5, rtol=0)
    for i, scale in enumerate(SCALES):
        alone = targets_alone(pipe, ask(i, **arguments), scale)
        torch.testing.assert_close(recording.target[recording.owner == i], alone, atol=TOLERANCE, rtol=TOLERANCE)
    assert rule.items() <= guidance_rule(pipe, arguments).items()


def test_another_rule_gives_other_targets() -> None:
    pipe = build("stable_diffusion")
    plain = targets_alone(pipe, ask(0), 7.0)
    for other in (
        targets_alone(pipe, ask(0, guidance_rescale=0.7), 7.0),
        targets_alone(pag(), ask(0, pag_scale=2.0), 7.0),
    ):
        assert float((other - plain).norm() / plain.norm()) > 10 * TOLERANCE


def test_the_conditional_part_is_found_at_any_position() -> None:
    null_first = find_layout(build("stable_diffusion"), ask(0))
    assert (null_first.calls, null_first.chunks, null_first.chunk) == (1, 2, 1)
    classes = Request([{"class_label": 3}], [0], STEPS, {})
    conditional_first = find_layout(tiny_dit(), classes)
    assert (conditional_first.calls, conditional_first.chunks, conditional_first.chunk) == (1, 2, 0)
    assert not conditional_first.learned_variance
    assert find_layout(tiny_dit(8), classes).learned_variance
    with_perturbed = find_layout(pag(), ask(0, pag_scale=2.0))
    assert (with_perturbed.chunks, with_perturbed.chunk) == (3, 1)


def skip_layer() -> tuple[Any, Request]:
    """A pipeline with a third pass at its second step only, and a request of four steps."""
    size = {"height": 32, "width": 32, "max_sequence_length": 32}
    third = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.5}
    return build("stable_diffusion_3"), ask(0, 1, **size, **third)


def counting(ran: list[int]) -> Any:
    def run(forward: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return forward(*args, **kwargs)

    return run


def test_a_third_pass_at_some_steps_is_recorded_as_it_acts() -> None:
    pipe, request = skip_layer()
    layout = find_layout(pipe, request)
    assert layout.parts == ((2,), (2, 1))
    assert (layout.calls, layout.call, layout.chunks, layout.chunk) == (2, 0, 2, 1)
    with undecoded(pipe), record(pipe, layout, 2) as recorder:
        sample(pipe, request, PerSampleScale(torch.tensor(SCALES)))
    recording = recorder.recording()
    without = dict(request.arguments, skip_guidance_layers=None)
    for i, scale in enumerate(SCALES):
        alone = replace(request, conditions=request.conditions[i : i + 1], seeds=[i])
        target, plain = (targets_alone(pipe, each, scale) for each in (alone, replace(alone, arguments=without)))
        torch.testing.assert_close(recording.target[recording.owner == i], target, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(target[0], plain[0])
        assert float((target[1] - plain[1]).norm() / plain[1].norm()) > 10 * TOLERANCE


def test_the_rows_of_each_step_are_counted_without_running_each() -> None:
    pipe, request = skip_layer()
    once = replace(request, conditions=request.conditions[:1], seeds=[0], num_inference_steps=20)
    ran: list[int] = []
    with patched(pipe.transformer.transformer_blocks[0], "forward", counting(ran)):
        assert rows_by_step(pipe, once, 3.0) == [(2,)] * 3 + [(2, 1)] * 7 + [(2,)] * 10
    assert len(ran) == 1


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.25, 0.75)])
def test_guidance_in_an_interval_of_the_steps_is_recorded_as_it_acts(modular: Any, start: float, stop: float) -> None:
    modular.update_components(guider=ClassifierFreeGuidance(start=start, stop=stop))
    layout = find_layout(modular, ask(0))
    assert layout.parts == ((1,), (1, 1))
    with undecoded(modular), record(modular, layout, 1) as recorder:
        sample(modular, ask(0), 7.0)
    guided = recorder.recording().guidance_delta > 0
    assert guided.tolist() == [start <= step / STEPS < stop for step in range(STEPS)]


def test_a_conditional_part_that_moves_is_refused() -> None:
    pipe, request = skip_layer()
    once = replace(request, conditions=request.conditions[:1], seeds=[0])
    twice = replace(once, conditions=once.conditions * 2, seeds=[0, 0])
    unguided = replace(without_guidance(pipe, once, twice), two=None)
    guided, arguments = probe(pipe, once, 3.0), find_arguments(pipe, unguided)
    assert place_conditional(pipe, arguments, unguided, guided, 1).chunk == 1
    call = guided[0].calls[0]
    swapped = {name: value.flip(0) if has_rows(value, 2) else value for name, value in call.inputs.items()}
    guided[0] = replace(guided[0], calls=[replace(call, inputs=swapped)])
    guided[2] = guided[3] = guided[0]
    with pytest.raises(UserError, match="not certain: at some steps it lies elsewhere than at others"):
        place_conditional(pipe, arguments, unguided, guided, 1)


def test_a_pipeline_whose_parts_are_alike_is_refused() -> None:
    with pytest.raises(UserError, match="StableDiffusionPipeline cannot .* is not certain: .* all are alike"):
        find_layout(build("stable_diffusion"), ask(0, negative_prompt=PROMPTS[0]))


def test_a_pipeline_that_guides_by_another_argument_is_refused() -> None:
    class Renamed(type(build("stable_diffusion"))):  # type: ignore[misc]
        def __call__(self, prompt: Any, strength_of_guidance: float = 1.0, **kwargs: Any) -> Any:
            return super().__call__(prompt, guidance_scale=strength_of_guidance, **kwargs)

    pipe = build("stable_diffusion")
    pipe.__class__ = Renamed
    with pytest.raises(
        UserError, match="Renamed cannot be guided: its call takes none of true_cfg_scale, guidance_scale"
    ):
        find_layout(pipe, ask(0))


def test_scales_that_cannot_be_mixed_are_noticed() -> None:
    class Doubling(type(build("stable_diffusion"))):  # type: ignore[misc]
        def __call__(self, *args: Any, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
            return super().__call__(*args, guidance_scale=float(guidance_scale), **kwargs)

    pipe = build("stable_diffusion")
    pipe.__class__ = Doubling
    assert not find_layout(pipe, ask(0)).scale_per_sample


def test_a_pipeline_that_changes_the_prediction_is_refused() -> None:
    class Turning(type(build("stable_diffusion"))):  # type: ignore[misc]
        def __call__(self, *args: Any, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
            step = self.scheduler.step

            def turned(output: Tensor, timestep: Any, latent: Tensor, **options: Any) -> Any:
                return (step(output.mT, timestep, latent.mT, **options)[0].mT,)

            self.scheduler.step = turned
            try:
                return super().__call__(*args, guidance_scale=guidance_scale, **kwargs)
            finally:
                self.scheduler.step = step

    pipe = build("stable_diffusion")
    pipe.__class__ = Turning
    with pytest.raises(UserError, match="Turning: its scheduler receives something else than its denoiser predicts"):
        find_layout(pipe, ask(0))


def test_a_teacher_that_guidance_does_not_change_is_refused() -> None:
    pipe = build("stable_diffusion")
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
    with pytest.raises(UserError, match="cannot be guided"):
        find_layout(pipe, ask(0))


def layout_of(calls: int, chunks: int, **changes: Any) -> Layout:
    arguments = Arguments("x", "t", {"x": Axis(), "prompt": Axis()}, {"ids": encoded(torch.arange(3), 4)})
    options = {
        "arguments": arguments,
        "calls": calls,
        "call": calls - 1,
        "chunks": chunks,
        "chunk": chunks - 1,
        "masks": ("prompt_mask",),
        "denoisers": ("unet",),
        "timestep_scale": 1.0,
        "timestep_offset": 0.0,
        "target_channels": (4,),
        "target_signs": (1,),
        "learned_variance": False,
        "no_guidance": {},
    }
    return Layout(**options | changes)


def call_of(rows: int, value: float = 0.0, **inputs: Any) -> Call:
    given = {
        "x": torch.full((rows, 8), value),
        "t": torch.tensor(3),
        "prompt": torch.ones(rows, 3, 2),
        "ids": torch.arange(3),
    }
    return Call(given | inputs, (torch.full((rows, 8), -value),), "unet")


def test_conditions_are_masked_and_constants_are_compared() -> None:
    layout = layout_of(1, 2)
    found = layout.conditional([call_of(4)], 2)
    assert torch.equal(found.cond["prompt"], torch.ones(2, 3, 2))
    assert torch.equal(found.cond["prompt_mask"], torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(found.timestep, torch.tensor([3, 3]))
    layout.check_constants(call_of(4), 2)
    with pytest.raises(UserError, match="ids changes from call to call"):
        layout.check_constants(call_of(4, ids=torch.arange(4)), 2)


def test_a_step_without_guidance_has_the_conditional_call_alone() -> None:
    layout = layout_of(2, 1)
    first, second = call_of(2, 0.0), call_of(2, 1.0)
    for calls, given in (([first, second], second), ([first], first)):
        found = layout.conditional(calls, 2)
        assert torch.equal(found.latent, given.inputs["x"])
        assert torch.equal(found.prediction, given.prediction[:, :4])
    with pytest.raises(UserError, match="3 denoiser calls in one step where 2 were found"):
        layout.conditional([first] * 3, 2)
    with pytest.raises(UserError, match="6 rows in a denoiser call for 2 samples where 1 for each"):
        layout.conditional([call_of(6)], 2)


def test_a_target_is_what_the_denoiser_would_have_had_to_predict() -> None:
    layout = layout_of(1, 2, target_signs=(-1,))
    seen = layout.conditional([call_of(4, 2.0)], 2)
    received = torch.arange(8.0).view(2, 4)
    assert torch.equal(layout.target([received], seen), -received)
    sound = layout_of(1, 1, target_channels=(4, 2), target_signs=(1, -1))
    two = replace(call_of(1), predictions=(torch.zeros(1, 8), torch.zeros(1, 2, 3)))
    target = sound.target([torch.ones(1, 4), torch.ones(1, 2, 3)], sound.conditional([two], 1))
    assert target.tolist() == [[1.0] * 4 + [-1.0] * 6]


def test_a_layout_is_read_back_from_json_unchanged() -> None:
    layout = find_layout(build("chroma"), ask(0, height=32, width=32, max_sequence_length=32))
    facts = {field.name: getattr(layout, field.name) for field in fields(LayoutFacts)}
    assert read_fields(LayoutFacts, json.loads(json.dumps(asdict(layout)))) == LayoutFacts(**facts)
