from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stages.generate.layout import find_layout
from stages.generate.recorder import Recording, record
from stages.generate.scale import PerSampleScale
from stages.sampling import Request, sample, undecoded
from tests.conftest import tiny_dit

SCALES, STEPS = [3.0, 7.0], 5
REQUEST = Request([{"class_label": 1}, {"class_label": 7}], [0, 1], STEPS, {})


def recorded(pipe: Any, steps: Tensor | None = None) -> tuple[Recording, Tensor]:
    """Two classes at two scales in one batch: the recording, and the final latents."""
    layout = find_layout(pipe, REQUEST)
    with undecoded(pipe) as latents, record(pipe, layout, 2, steps) as recorder:
        sample(pipe, REQUEST, PerSampleScale(torch.tensor(SCALES)))
    return recorder.recording(), latents[0]


def run_alone(pipe: Any, i: int) -> Tensor:
    """The untouched pipeline for one class at one scale: its final latent."""
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
def test_targets_equal_guidance_by_hand_from_two_separate_passes(out_channels: int) -> None:
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
    torch.testing.assert_close(recording.target, u + w * (c - u), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(c, u, atol=1e-2)


def test_only_the_steps_asked_for_are_kept() -> None:
    pipe = tiny_dit()
    whole, _ = recorded(pipe)
    part, _ = recorded(pipe, torch.tensor([[0, 3], [2, 3]]))
    assert list(zip(part.owner.tolist(), part.step.tolist(), strict=True)) == [(0, 0), (1, 2), (0, 3), (1, 3)]
    for i, (owner, step) in enumerate(zip(part.owner, part.step, strict=True)):
        same = int(((whole.owner == owner) & (whole.step == step)).nonzero())
        assert torch.equal(part.latent[i], whole.latent[same])
        assert torch.equal(part.target[i], whole.target[same])
        assert part.timestep[i] == whole.timestep[same]


class ClosedForm(ModelMixin, ConfigMixin):
    """A denoiser whose guided prediction is known: x / 2 + label for a class, x / 2 without."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 4, out_channels: int = 4) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        label = torch.where(class_labels == 1000, 0, class_labels).view(-1, 1, 1, 1)
        return Transformer2DModelOutput(sample=hidden_states / 2 + label)


def test_a_closed_form_teacher_is_recorded_as_known() -> None:
    pipe = tiny_dit()
    pipe.register_modules(transformer=ClosedForm())
    recording, _ = recorded(pipe)
    guidance = (torch.tensor(SCALES) * torch.tensor([1, 7]))[recording.owner]
    torch.testing.assert_close(recording.target, recording.latent / 2 + guidance.view(-1, 1, 1, 1))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    for i in range(2):
        mine = recording.owner == i
        latents, targets, timesteps = recording.latent[mine], recording.target[mine], recording.timestep[mine]
        for step in range(STEPS - 1):
            after = scheduler.step(targets[step], int(timesteps[step]), latents[step]).prev_sample
            torch.testing.assert_close(after, latents[step + 1])


def test_the_pipeline_is_as_it_was_afterwards() -> None:
    pipe = tiny_dit()
    before = run_alone(pipe, 0)
    recorded(pipe)
    assert torch.equal(run_alone(pipe, 0), before)
    assert "step" not in vars(pipe.scheduler)
    assert "decode" not in vars(pipe.vae)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
