from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from stages.base import undecoded
from stages.errors import UserError
from stages.generate.recorder import Recording, record, shifted_timesteps
from tests.conftest import tiny_dit

LABELS, SCALES, STEPS = [1, 7], [3.0, 7.0], 5


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def recorded(pipe: Any) -> tuple[Recording, Tensor]:
    """Two classes at two scales in one batch: the recording, and the final latents."""
    with (
        undecoded(pipe) as latents,
        record(pipe, torch.tensor(SCALES), {"class_labels": torch.tensor(LABELS)}) as recorder,
    ):
        pipe(LABELS, 2.0, generators(), STEPS, "pt")
    return recorder.recording(), latents[0]


def run_alone(pipe: Any, i: int) -> Tensor:
    """The untouched pipeline for one class at one scale: its final latent."""
    with undecoded(pipe) as latents:
        pipe([LABELS[i]], SCALES[i], [generators()[i]], STEPS, "pt")
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
    assert recording.latent.shape == recording.target.shape == (STEPS, 2, 4, 8, 8)
    assert torch.equal(recording.cond["class_labels"], torch.tensor(LABELS))
    for step in range(STEPS):
        inputs = {"timestep": recording.timestep[step], "return_dict": False}
        with torch.no_grad():
            c = pipe.transformer(recording.latent[step], class_labels=torch.tensor(LABELS), **inputs)[0][:, :4]
            u = pipe.transformer(recording.latent[step], class_labels=torch.tensor([1000, 1000]), **inputs)[0][:, :4]
        w = torch.tensor(SCALES).view(2, 1, 1, 1)
        torch.testing.assert_close(recording.target[step], u + w * (c - u), atol=2e-5, rtol=1e-4)
        assert not torch.allclose(c, u, atol=1e-2)


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
    guidance = torch.tensor(SCALES) * torch.tensor(LABELS)
    expected = recording.latent / 2 + guidance.view(1, 2, 1, 1, 1)
    torch.testing.assert_close(recording.target, expected)
    previous = DDIMScheduler.from_config(pipe.scheduler.config)
    previous.set_timesteps(STEPS)
    for step in range(STEPS - 1):
        t = int(recording.timestep[step, 0])
        after = previous.step(recording.target[step], t, recording.latent[step]).prev_sample
        torch.testing.assert_close(after, recording.latent[step + 1])


def test_the_pipeline_is_as_it_was_afterwards() -> None:
    pipe = tiny_dit()
    before = run_alone(pipe, 0)
    recorded(pipe)
    assert torch.equal(run_alone(pipe, 0), before)
    assert "step" not in vars(pipe.scheduler)
    assert "decode" not in vars(pipe.vae)
    assert not pipe.transformer._forward_hooks


def test_a_batch_whose_halves_are_alike_is_refused() -> None:
    pipe = tiny_dit()
    nothing = {"class_labels": torch.tensor([1000, 1000])}
    with pytest.raises(UserError, match="not certain"), undecoded(pipe), record(pipe, torch.tensor(SCALES), nothing):
        pipe([1000, 1000], 2.0, generators(), STEPS, "pt")


def test_an_unguided_batch_is_refused() -> None:
    pipe = tiny_dit()
    labels = {"class_labels": torch.tensor(LABELS)}
    with (
        pytest.raises(UserError, match="a batch of 2 for 2 guided"),
        undecoded(pipe),
        record(pipe, torch.ones(2), labels),
    ):
        pipe(LABELS, 1.0, generators(), STEPS, "pt")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_shifted_grids_cover_the_training_range_and_stay_inside(spacing: str) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    seen = set()
    for shift in torch.arange(0, 1, 0.01).tolist():
        with shifted_timesteps(scheduler, shift):
            scheduler.set_timesteps(20)
        seen |= set(scheduler.timesteps.tolist())
    assert min(seen) >= 0
    assert max(seen) <= 999
    assert len(seen) >= 990
    scheduler.set_timesteps(20)
    assert "set_timesteps" not in vars(scheduler)
