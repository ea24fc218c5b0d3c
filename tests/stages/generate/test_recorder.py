from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stages.base.sampling import Request, sample, undecoded
from stages.generate.finding import find_layout
from stages.generate.recorder import Recording, guidance_effect, record
from stages.generate.scale import PerSampleScale
from tests.conftest import tiny_dit

SCALES, STEPS = [3.0, 7.0], 5
REQUEST = Request([{"class_label": 1}, {"class_label": 7}], [0, 1], STEPS, {})


def recorded(pipe: Any, steps: Tensor | None = None) -> tuple[Recording, Tensor]:
    """Record two classes at two scales in one batch; return the recording and the final latents."""
    layout = find_layout(pipe, REQUEST)
    with undecoded(pipe) as latents, record(pipe, layout, 2, steps) as recorder:
        sample(pipe, REQUEST, PerSampleScale(torch.tensor(SCALES)))
    return recorder.recording(), latents[0]


def run_alone(pipe: Any, i: int) -> Tensor:
    """Run the untouched pipeline for one class at one scale; return its final latent."""
    with undecoded(pipe) as latents:
        sample(pipe, Request(REQUEST.conditions[i : i + 1], [i], STEPS, {}), SCALES[i])
    return latents[0][0]


@pytest.mark.parametrize("out_channels", [4, 8])
def test_scales_of_one_batch_equal_the_pipelines_own_separate_runs(out_channels: int) -> None:
    pipe = tiny_dit(out_channels).to(torch.float64)
    _, final = recorded(pipe)
    for i in range(2):
        torch.testing.assert_close(final[i], run_alone(pipe, i), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run_alone(pipe, 0), run_alone(pipe, 1), atol=1e-2)


@pytest.mark.parametrize("out_channels", [4, 8])
def test_targets_equal_guidance_computed_from_two_separate_passes(out_channels: int) -> None:
    pipe = tiny_dit(out_channels)
    recording, _ = recorded(pipe)
    assert recording.latent.shape == recording.target.shape == (2 * STEPS, 4, 8, 8)
    labels = torch.tensor([1, 7])
    assert torch.equal(recording.cond["class_labels"], labels)
    inputs = {"timestep": recording.timestep, "return_dict": False}
    with torch.no_grad():
        c = pipe.transformer(recording.latent, class_labels=labels[recording.owner], **inputs)[0][:, :4]
        u = pipe.transformer(recording.latent, class_labels=torch.full_like(recording.owner, 1000), **inputs)[0][:, :4]
    w = torch.tensor(SCALES)[recording.owner].view(-1, 1, 1, 1)
    g = u + w * (c - u)
    torch.testing.assert_close(recording.target, g, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(c, u, atol=1e-2)
    lengths = c.square().sum((1, 2, 3)).sqrt() * g.square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(recording.guidance_cosine, (c * g).sum((1, 2, 3)) / lengths, atol=1e-6, rtol=0)
    torch.testing.assert_close(recording.guidance_delta, (g - c).square().mean((1, 2, 3)), atol=0, rtol=1e-4)
    assert float(recording.guidance_cosine.max()) < 0.999


def test_only_the_requested_steps_are_kept() -> None:
    pipe = tiny_dit()
    whole, _ = recorded(pipe)
    part, _ = recorded(pipe, torch.tensor([[0, 3], [2, 3]]))
    assert list(zip(part.owner.tolist(), part.step.tolist(), strict=True)) == [(0, 0), (1, 2), (0, 3), (1, 3)]
    for i, (owner, step) in enumerate(zip(part.owner, part.step, strict=True)):
        same = int(((whole.owner == owner) & (whole.step == step)).nonzero())
        assert torch.equal(part.latent[i], whole.latent[same])
        assert torch.equal(part.target[i], whole.target[same])
        assert part.timestep[i] == whole.timestep[same]
        assert part.guidance_cosine[i] == whole.guidance_cosine[same]
        assert part.guidance_delta[i] == whole.guidance_delta[same]


class ClosedForm(ModelMixin, ConfigMixin):
    """A denoiser with a known guided prediction: x / 2 + label for a class, x / 2 without."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 4, out_channels: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(sample_size, sample_size)  # for an adapter

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        label = torch.where(class_labels == 1000, 0, class_labels).view(-1, 1, 1, 1)
        return Transformer2DModelOutput(sample=hidden_states / 2 + label + 0 * self.layer(hidden_states))


def test_the_records_of_a_closed_form_teacher_are_exact() -> None:
    pipe = tiny_dit()
    pipe.register_modules(transformer=ClosedForm())
    recording, _ = recorded(pipe)
    guidance = (torch.tensor(SCALES) * torch.tensor([1, 7]))[recording.owner]
    torch.testing.assert_close(recording.target, recording.latent / 2 + guidance.view(-1, 1, 1, 1))
    moved = ((torch.tensor(SCALES) - 1) * torch.tensor([1, 7]))[recording.owner]
    torch.testing.assert_close(recording.guidance_delta, moved.square())
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    for i in range(2):
        mine = recording.owner == i
        latents, targets, timesteps = recording.latent[mine], recording.target[mine], recording.timestep[mine]
        for step in range(STEPS - 1):
            after = scheduler.step(targets[step], int(timesteps[step]), latents[step]).prev_sample
            torch.testing.assert_close(after, latents[step + 1])


def test_the_effect_of_guidance_is_measured_over_all_elements() -> None:
    c = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[0.0, 0.0]]])
    g = torch.tensor([[[4.0, -3.0]], [[3.0, 4.0]], [[1.0, 1.0]]])
    cosine, delta = guidance_effect(c, g)
    assert torch.equal(cosine, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(delta, torch.tensor([25.0, 0.0, 1.0]))
    assert {value.dtype for value in guidance_effect(c.bfloat16(), g.bfloat16())} == {torch.float32}


def test_a_small_effect_on_a_large_prediction_is_not_lost_in_rounding() -> None:
    """Summed in float32, 1 - cosine would be wrong by several times itself here, and a cosine above 1."""
    c = torch.randn(4, 4, 256, 256, generator=torch.Generator().manual_seed(0))
    change = 1e-3 * torch.randn(c.shape, generator=torch.Generator().manual_seed(1))
    cosine, delta = guidance_effect(c, c + change)
    expected = 0.5e-6 * torch.ones(4)  # half the squared angle
    torch.testing.assert_close(1 - cosine, expected, atol=0.6e-7, rtol=0)
    torch.testing.assert_close(delta, change.square().mean((1, 2, 3)), atol=0, rtol=1e-3)
    assert torch.equal(guidance_effect(c, c)[0], torch.ones(4))


def test_the_pipeline_is_unchanged_afterwards() -> None:
    pipe = tiny_dit()
    before = run_alone(pipe, 0)
    recorded(pipe)
    assert torch.equal(run_alone(pipe, 0), before)
    assert "step" not in vars(pipe.scheduler)
    assert "decode" not in vars(pipe.vae)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
