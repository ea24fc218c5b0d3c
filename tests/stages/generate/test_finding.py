"""The layouts found for pipelines with peculiar guidance.

tests/test_pipelines.py covers the whole zoo.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stages.base.arguments import Axis
from stages.base.sampling import Request
from stages.errors import UserError
from stages.generate.finding import find_layout
from stages.generate.layout import Layout
from tests.pipelines_zoo.gathered import gather
from tests.support.families import build

ZOO = gather()


def found(name: str) -> Layout:
    specimen = ZOO[name]
    return find_layout(specimen.build(), Request(list(specimen.conditions), [0], 3, dict(specimen.arguments)))


def test_minus_the_prediction_and_reversed_timesteps_are_found() -> None:
    layout = found("Lumina2Pipeline")
    assert layout.target_signs == (-1,)
    assert (layout.timestep_scale, layout.timestep_offset) == (-1e-3, 1.0)


def test_lists_of_samples_and_a_scale_that_counts_from_0_are_found() -> None:
    layout = found("ZImagePipeline")
    assert (layout.arguments.latent, layout.arguments.timestep) == ("x", "t")
    assert layout.arguments.axes["x"] == layout.arguments.axes["cap_feats"] == Axis(listed=True)
    assert (layout.no_guidance, layout.scale_offset) == ({"guidance_scale": 0.0}, 1.0)
    assert not layout.scale_per_sample


def test_every_setting_that_guides_is_switched_off() -> None:
    layout = found("StableDiffusionPAGPipeline")
    assert layout.no_guidance == {"guidance_scale": 1.0, "pag_scale": 0.0}
    assert (layout.chunks, layout.chunk) == (3, 1)


def test_two_denoisers_are_found_and_two_predictions() -> None:
    assert found("WanPipeline (2.2)").denoisers == ("transformer", "transformer_2")
    sound = found("LTX2Pipeline")
    assert len(sound.target_channels) == 2
    assert "audio_hidden_states" in sound.arguments.steps


def test_several_rows_for_each_sample_are_found() -> None:
    assert found("AnimateDiffPipeline").arguments.axes["encoder_hidden_states"].rows == 3


def test_prompts_that_change_each_other_run_one_by_one() -> None:
    assert found("LattePipeline").one_sample
    assert found("CogView4Pipeline").one_sample
    assert not found("SanaPipeline").one_sample


def test_an_embedded_guidance_scale_is_no_second_pass() -> None:
    with pytest.raises(
        UserError, match="Flux2Pipeline cannot be recorded: it calls its denoiser once per step at every"
    ):
        found("Flux2Pipeline")


def test_a_pipeline_that_does_not_run_is_named_with_its_error() -> None:
    pipe = build("stable_diffusion")
    request = Request([{"prompt": "a seven"}], [0], 3, {"prompt_embeds": torch.zeros(1, 2, 3)})
    with pytest.raises(
        UserError, match="^StableDiffusionPipeline does not run at scale 1: ValueError: Cannot forward both"
    ):
        find_layout(pipe, request)


def test_a_denoiser_that_sees_more_than_its_arguments_is_refused() -> None:
    pipe = build("stable_diffusion")
    rows: list[int] = []

    def drift(module: nn.Module, args: Any, output: Any) -> Any:
        rows.append(len(output[0]))
        change = 1.0 + (rows[-1] == 6)  # simulates a state for the samples of the pipeline's call
        return (output[0] * change,) if isinstance(output, tuple) else type(output)(sample=output.sample * change)

    pipe.unet.register_forward_hook(drift)
    with pytest.raises(UserError, match="does not predict the same from records"):
        find_layout(pipe, Request([{"prompt": "a seven"}], [0], 3, {}))


def test_the_remains_of_a_failed_attempt_in_the_denoiser_do_not_affect_the_next() -> None:
    """With `guidance_scale` alone switched off the pipeline fails, and leaves its perturbed attention in place."""
    assert found("HunyuanDiTPAGPipeline").no_guidance == {"guidance_scale": 1.0, "pag_scale": 0.0}


def test_self_attention_guidance_is_switched_off_beside_the_scale() -> None:
    layout = found("StableDiffusionSAGPipeline")
    assert layout.no_guidance == {"guidance_scale": 1.0, "sag_scale": 0.0}
    assert (layout.calls, layout.call, layout.chunks, layout.chunk) == (2, 0, 2, 1)
