"""Every family through the recorder: the records equal the untouched pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.base.arguments import Caller
from stages.base.denoiser import as_target, denoiser_of, predictions_of
from stages.base.hooks import watch_steps
from stages.base.sampling import Request, sample, undecoded
from stages.generate.finding import find_layout
from stages.generate.layout import Layout, Pass
from stages.generate.recorder import Recording, record
from stages.generate.scale import PerSampleScale
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build

SCALES, STEPS = (3.0, 7.0), 4


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: str) -> Any:
    return build(family)


def ask(family: str, *places: int) -> Request:
    conditions = [{"prompt": PROMPTS[i]} for i in places]
    return Request(conditions, list(places), STEPS, ARGUMENTS.get(family, {}))


@pytest.fixture(scope="module")
def layout(pipe: Any, family: str) -> Layout:
    return find_layout(pipe, ask(family, 0))


@pytest.fixture(scope="module")
def recorded(pipe: Any, family: str, layout: Layout) -> tuple[Recording, Tensor]:
    """Record two prompts at two scales in one batch; return the recording and the final latents."""
    with undecoded(pipe) as latents, record(pipe, layout, 2) as recorder:
        sample(pipe, ask(family, 0, 1), PerSampleScale(torch.tensor(SCALES)))
    return recorder.recording(), latents[0]


def test_a_mixed_batch_ends_where_the_untouched_pipeline_ends(
    pipe: Any, family: str, layout: Layout, recorded: tuple[Recording, Tensor]
) -> None:
    assert layout.scale_per_sample
    for i, scale in enumerate(SCALES):
        with undecoded(pipe) as latents:
            sample(pipe, ask(family, i), scale)
        torch.testing.assert_close(recorded[1][i], latents[0][0], atol=2e-4, rtol=2e-4)


def predictions(denoiser: Any, layout: Layout, seen: Pass) -> Tensor:
    """Return the guided channels of a separate pass for these inputs."""
    caller = Caller(layout.arguments, torch.device("cpu"))
    with torch.no_grad():
        output = denoiser(**caller.nested(seen.latent, seen.timestep, seen.cond), return_dict=False)
    return as_target(predictions_of(output), layout.target_channels)


def test_targets_equal_guidance_computed_from_two_separate_passes(
    pipe: Any, family: str, layout: Layout, recorded: tuple[Recording, Tensor]
) -> None:
    recording, _ = recorded
    denoiser, steps = denoiser_of(pipe)[1], []
    with undecoded(pipe), watch_steps(pipe, lambda calls, received, _: steps.append((calls, received[0]))):
        sample(pipe, ask(family, 0, 1), PerSampleScale(torch.tensor(SCALES)))
    assert len(steps) == STEPS
    null = replace(layout, call=layout.calls - 1 - layout.call, chunk=layout.chunks - 1 - layout.chunk)
    for step, (calls, prediction) in enumerate(steps):
        c = predictions(denoiser, layout, layout.conditional(calls, 2))
        u = predictions(denoiser, layout, null.conditional(calls, 2))
        expected = u + torch.tensor(SCALES).view(2, *[1] * (c.ndim - 1)) * (c - u)
        if family == "qwen_image":  # keeps the norm of the conditional prediction, token by token
            expected = expected * c.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(layout.part(prediction, 2), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(c, u, atol=1e-3)
        mine = recording.step == step
        for i in range(2):
            cosine = torch.dot(c[i].flatten(), expected[i].flatten()) / (c[i].norm() * expected[i].norm())
            delta = (expected[i] - c[i]).square().mean()
            torch.testing.assert_close(recording.guidance_cosine[mine][i], cosine, atol=1e-5, rtol=0)
            torch.testing.assert_close(recording.guidance_delta[mine][i], delta, atol=0, rtol=1e-3)


def test_at_scale_1_guidance_changes_nothing(pipe: Any, family: str, layout: Layout) -> None:
    with undecoded(pipe), record(pipe, layout, 2) as recorder:
        sample(pipe, ask(family, 0, 1), PerSampleScale(torch.tensor([1.0, 7.0])))
    with undecoded(pipe), record(pipe, layout, 1) as unguided:
        sample(pipe, ask(family, 0), 1.0)
    recording = recorder.recording()
    off, on = (recording.guidance_delta[recording.owner == i] for i in range(2))
    assert off.max() < 1e-6 * on.min()
    torch.testing.assert_close(recording.guidance_cosine[recording.owner == 0], torch.ones(STEPS), atol=1e-6, rtol=0)
    assert torch.equal(unguided.recording().guidance_delta, torch.zeros(STEPS))
    assert torch.equal(unguided.recording().guidance_cosine, torch.ones(STEPS))


def test_the_recorded_inputs_are_those_of_the_conditional_pass(
    recorded: tuple[Recording, Tensor], layout: Layout
) -> None:
    recording, _ = recorded
    assert len(recording.latent) == len(recording.target) == len(recording.timestep) == 2 * STEPS
    assert {len(value) for value in recording.cond.values()} == {2}
    assert not torch.equal(recording.cond["encoder_hidden_states"][0], recording.cond["encoder_hidden_states"][1])
    assert set(layout.arguments.conditions) <= set(recording.cond)
