"""Options of an attached pipeline's call are applied, refused, or warned about."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxFillPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.adapters.metadata import AdapterMetadata, Base
from stages.base.denoiser import denoisers_of
from stages.base.hooks import Call, watch_steps
from stages.errors import UserError
from tests.conftest import tiny_dit
from tests.pipelines_zoo.gathered import gather
from tests.stages.adapters.test_compositions import METADATA, adapter_for
from tests.stages.adapters.test_contract import new_adapter
from tests.support.families import PROMPTS, build

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore:the guidance is not fused")


class Run:
    """One call of a specimen: its latents, and its denoisers' inputs."""

    def __init__(self, name: str, pipe: Any, **arguments: Any) -> None:
        specimen = ZOO[name]
        self.steps: list[list[Call]] = []
        self.latents: list[Tensor] = []
        options = dict(specimen.arguments) | {"prompt": specimen.conditions[0]["prompt"]} | arguments
        parameters = inspect.signature(type(pipe).__call__).parameters
        options |= {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS}
        options |= {"output_type": "latent"} if "output_type" in parameters else {}
        with watch_steps(pipe, self._see, self.latents.append):
            pipe(**options)

    def _see(self, calls: list[Call], handed: Tensor, timestep: Any) -> None:
        self.steps.append(list(calls))

    @property
    def end(self) -> Tensor:
        return self.latents[-1]

    def given(self, name: str) -> list[float]:
        """Return the denoiser's argument of this name in each call."""
        return [float(torch.as_tensor(call.inputs[name]).flatten()[0]) for calls in self.steps for call in calls]

    @property
    def rows(self) -> set[int]:
        """Return the numbers of rows of all steps."""
        return {sum(len(call.prediction) for call in calls) for calls in self.steps}


ZOO = gather()


def adapter_on(pipe: Any, component: str | None = None, **metadata: Any) -> GuidanceAdapter:
    """Create an adapter with random weights for a component of a pipeline."""
    name = component or next(iter(denoisers_of(pipe)))
    options = {"conditions": {}, "base": Base(denoiser_subfolder=name), "scale_range": [1.0, 9.0]} | metadata
    return adapter_for(denoisers_of(pipe)[name], "lora", metadata=AdapterMetadata(**options))


def warnings_of(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and w.filename == __file__]


# Switching the pipeline's own guidance off


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"])
def test_every_setting_of_the_guidance_is_switched_off(name: str) -> None:
    pipe = ZOO[name].build()
    off = {"guidance_scale": 1.0, "pag_scale": 0.0}
    plain = Run(name, pipe, **off)
    adapter = adapter_on(pipe, no_guidance=off, guidance_rule={"name": "ClassifierFreeGuidance", "pag_scale": 3.0})
    untrained = GuidanceAdapter.for_denoiser(adapter.config, pipe.unet, adapter.metadata).attach(pipe)
    one = Run(name, pipe, guidance_scale=4.0)
    untrained.detach()
    assert one.rows == plain.rows == {1}
    assert torch.equal(one.end, plain.end)
    adapter.attach(pipe)
    assert not torch.allclose(Run(name, pipe, guidance_scale=4.0).end, plain.end)
    assert "pag_scale=1.0 does not change the guidance" in warnings_of(lambda: Run(name, pipe, pag_scale=1.0))[0]


def test_guidance_that_is_off_at_zero_counts_from_zero() -> None:
    name = "ZImagePipeline"
    pipe = ZOO[name].build()
    plain = Run(name, pipe, guidance_scale=0.0)
    adapter = adapter_on(pipe, no_guidance={"guidance_scale": 0.0}, scale_offset=1.0, timestep="t").attach(pipe)
    assert torch.equal(Run(name, pipe, guidance_scale=0.0).end, plain.end)
    at_half, at_three = (Run(name, pipe, guidance_scale=scale) for scale in (0.5, 3.0))
    assert at_three.rows == {1}
    assert not torch.allclose(at_half.end, plain.end)
    with adapter.guidance_scale(4.0):
        torch.testing.assert_close(Run(name, pipe).end, at_three.end)


# An embedded scale beside the adapter's


@pytest.mark.parametrize("name", ["FluxPipeline (true CFG)", "HunyuanVideoPipeline"])
def test_the_embedded_scale_is_the_recorded_one_unless_both_are_named(name: str) -> None:
    pipe = ZOO[name].build()
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    adapter = adapter_on(pipe, arguments={"guidance_scale": 2.5}, no_guidance={"true_cfg_scale": 1.0}).attach(pipe)
    arguments = {key: value for key, value in ZOO[name].arguments.items() if not key.endswith("_scale")}
    embedded = Run(name, pipe, **arguments, true_cfg_scale=1.0, guidance_scale=1.0).given("guidance")[0]
    as_recorded = [embedded * 2.5] * STEPS
    cases = {
        "the adapter's by the usual name": {"guidance_scale": 4.0},
        "the adapter's by the pipeline's": {"true_cfg_scale": 4.0},
    }
    ends = []
    for call_options in cases.values():
        pipe_call = dict(arguments) | call_options
        run = call(pipe, pipe_call, ZOO[name].conditions[0]["prompt"])
        assert run.given("guidance") == pytest.approx(as_recorded)
        assert run.rows == {1}
        ends.append(run.end)
    assert torch.equal(*ends)
    both = call(pipe, arguments | {"true_cfg_scale": 4.0, "guidance_scale": 5.0}, ZOO[name].conditions[0]["prompt"])
    assert both.given("guidance") == pytest.approx([embedded * 5.0] * STEPS)
    adapter.metadata = replace(adapter.metadata, arguments={})
    unrecorded = call(pipe, arguments | {"guidance_scale": 4.0}, ZOO[name].conditions[0]["prompt"])
    assert unrecorded.given("guidance") == pytest.approx([embedded * default] * STEPS)


def call(pipe: Any, arguments: dict[str, Any], prompt: str) -> Run:
    run = Run.__new__(Run)
    run.steps, run.latents = [], []
    info = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS, "output_type": "latent"}
    with watch_steps(pipe, run._see, run.latents.append):
        pipe(prompt=prompt, **arguments, **info)
    return run


# Two denoisers

WAN = "WanPipeline (2.2)"


@pytest.fixture
def wan() -> Any:
    return ZOO[WAN].build()


def test_each_denoiser_has_its_adapter_and_its_scale(wan: Any) -> None:
    plain = Run(WAN, wan, guidance_scale=1.0)
    noisy, late = adapter_on(wan, "transformer").attach(wan), adapter_on(wan, "transformer_2").attach(wan)
    assert torch.equal(Run(WAN, wan, guidance_scale=1.0).end, plain.end)
    both = Run(WAN, wan, guidance_scale=3.0, guidance_scale_2=5.0)
    assert both.rows == {1}
    with noisy.guidance_scale(3.0), late.guidance_scale(5.0):
        torch.testing.assert_close(Run(WAN, wan).end, both.end)
    unlike = [
        Run(WAN, wan, guidance_scale=3.0).end,
        Run(WAN, wan, guidance_scale=3.0, guidance_scale_2=1.0).end,
        Run(WAN, wan, guidance_scale=1.0, guidance_scale_2=5.0).end,
    ]
    assert not any(torch.allclose(end, both.end, atol=1e-6) for end in unlike)
    torch.testing.assert_close(unlike[0], Run(WAN, wan, guidance_scale=3.0, guidance_scale_2=3.0).end)
    late.detach()
    assert warnings_of(lambda: Run(WAN, wan, guidance_scale=3.0)) == [
        "transformer_2 carries no adapter, so its steps run without guidance: attach the adapter made for it too"
    ]
    torch.testing.assert_close(Run(WAN, wan, guidance_scale=3.0).end, unlike[1])
    noisy.detach()
    assert type(wan).__call__ is type(ZOO[WAN].build()).__call__
    assert torch.equal(Run(WAN, wan, guidance_scale=1.0).end, plain.end)


def test_schedules_and_fused_scales_of_two_denoisers(wan: Any) -> None:
    noisy, late = adapter_on(wan, "transformer").attach(wan), adapter_on(wan, "transformer_2").attach(wan)
    expected = Run(WAN, wan, guidance_scale=3.0, guidance_scale_2=5.0).end
    with noisy.guidance_schedule([3.0] * STEPS), late.guidance_schedule([5.0] * STEPS):
        torch.testing.assert_close(Run(WAN, wan).end, expected)
    noisy.fuse(3.0)
    late.fuse(5.0)
    torch.testing.assert_close(Run(WAN, wan).end, expected)


def test_a_callback_cuts_the_guidance_of_both(wan: Any) -> None:
    noisy, late = adapter_on(wan, "transformer").attach(wan), adapter_on(wan, "transformer_2").attach(wan)

    def cut(pipe: Any, i: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            pipe._guidance_scale = 0.0
        return kwargs

    found = Run(WAN, wan, guidance_scale=3.0, guidance_scale_2=5.0, callback_on_step_end=cut).end
    off = [3.0, *[1.0] * (STEPS - 1)]
    with noisy.guidance_schedule(off), late.guidance_schedule(off):
        torch.testing.assert_close(found, Run(WAN, wan).end)


def test_an_adapter_of_the_second_denoiser_needs_a_pipeline_that_has_one() -> None:
    pipe = build("wan")
    with pytest.raises(UserError, match="WanPipeline has no transformer_2, which the adapter was made for"):
        adapter_on(pipe, base=Base(denoiser_subfolder="transformer_2")).attach(pipe)


# Guiders


@pytest.mark.parametrize("name", ["HunyuanImagePipeline", "MotifVideoPipeline"])
def test_a_guider_is_disabled_for_the_call(name: str) -> None:
    pipe = ZOO[name].build()
    guider = pipe.guider
    number = guider.guidance_scale
    guider.disable()
    plain = Run(name, pipe)
    guider.enable()
    guided = Run(name, pipe)
    adapter = adapter_on(pipe).attach(pipe)
    assert "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
    assert torch.equal(Run(name, pipe, guidance_scale=1.0).end, plain.end)
    four = Run(name, pipe, guidance_scale=4.0)
    assert four.rows == {1}
    assert guided.rows == {2}
    with adapter.guidance_scale(4.0):
        torch.testing.assert_close(Run(name, pipe).end, four.end)
    torch.testing.assert_close(Run(name, pipe).end, Run(name, pipe, guidance_scale=number).end)
    assert pipe.guider is guider
    assert guider._enabled
    adapter.detach()
    assert torch.equal(Run(name, pipe).end, guided.end)


# All or nothing


def test_an_attach_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("stable_diffusion")
    adapter = adapter_for(pipe.unet, "offset")

    def fail(denoiser: Any) -> Any:
        yield denoiser.register_forward_hook(lambda *_: None)
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(adapter, "site_hooks", fail)
        adapter.attach(pipe)
    assert type(pipe) is StableDiffusionPipeline
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert adapter.denoiser is None
    adapter.attach(pipe).detach()
    for variant in ("lora", "offset"):
        with pytest.raises(UserError, match="does not fit"):
            new_adapter(tiny_dit().transformer, variant).attach(pipe)
        assert type(pipe) is StableDiffusionPipeline
        assert "_guidance_attachment" not in vars(pipe.unet)


# Pipelines with another guidance rule

STABLE_DIFFUSION = replace(
    METADATA, guidance_rule={"name": "ClassifierFreeGuidance", "pipeline": "StableDiffusionPipeline"}
)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(StableDiffusionPAGPipeline, "pag_scale"), (StableDiffusionInstructPix2PixPipeline, "image_guidance_scale")],
)
def test_a_pipeline_that_guides_in_another_way_is_refused(kind: Any, setting: str) -> None:
    pipe = kind.from_pipe(build("stable_diffusion"))
    adapter = adapter_for(pipe.unet, metadata=STABLE_DIFFUSION)
    with pytest.raises(
        UserError, match=f"{kind.__name__} guides by {setting}, the StableDiffusionPipeline of the records does not"
    ):
        adapter.attach(pipe)
    assert type(pipe) is kind


def test_a_pipeline_without_the_recorded_arguments_is_refused() -> None:
    pipe = build("stable_diffusion")
    metadata = replace(
        METADATA,
        guidance_rule={"pipeline": "StableDiffusionPAGPipeline", "pag_scale": 3.0},
        no_guidance={"guidance_scale": 1.0, "pag_scale": 0.0},
    )
    with pytest.raises(
        UserError, match="does not guide by pag_scale, the StableDiffusionPAGPipeline of the records does"
    ):
        adapter_for(pipe.unet, metadata=metadata).attach(pipe)


def test_a_scale_with_another_meaning_is_refused() -> None:
    pipe = ZOO["FluxPipeline (true CFG)"].build()
    filling = FluxFillPipeline(**{name: part for name, part in pipe.components.items() if name in FILLING})
    adapter = adapter_on(pipe, base=Base(denoiser_subfolder="transformer", pipeline_class="FluxPipeline"))
    with pytest.raises(UserError, match="FluxFillPipeline guides by guidance_scale, .* by true_cfg_scale"):
        adapter.attach(filling)


FILLING = inspect.signature(FluxFillPipeline.__init__).parameters


def test_a_pipeline_with_the_same_guidance_is_accepted() -> None:
    pipe = build("stable_diffusion")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    adapter_for(pipe.unet, metadata=STABLE_DIFFUSION).attach(pipe).attach(other)


# Settings, negatives, classes


def test_a_warning_names_a_guidance_setting_that_was_not_recorded() -> None:
    pipe = build("stable_diffusion")
    recorded = replace(METADATA, guidance_rule={"pipeline": "StableDiffusionPipeline", "guidance_rescale": 0.5})
    adapter_for(pipe.unet, metadata=recorded).attach(pipe)
    options = {"prompt": PROMPTS, "num_inference_steps": 1, "output_type": "latent"}
    assert warnings_of(lambda: pipe(**options, guidance_rescale=0.7)) == [
        "guidance_rescale=0.7 does not change the guidance of this adapter, which was recorded with "
        "guidance_rescale=0.5: leave it out, or train an adapter on such records"
    ]
    assert not warnings_of(lambda: pipe(**options, guidance_rescale=0.5))
    assert not warnings_of(lambda: pipe(**options, guidance_scale=3.0, clip_skip=None))


@pytest.mark.parametrize(
    "given",
    [{"negative_prompt_2": "blurry"}, {"negative_target_size": (64, 64)}, {"negative_prompt": [" ", "blurry"]}],
)
def test_a_warning_names_negative_arguments_without_effect(given: dict[str, Any]) -> None:
    pipe = build("stable_diffusion_xl")
    adapter_for(pipe.unet).attach(pipe)
    options = {"prompt": PROMPTS, "num_inference_steps": 1, "output_type": "latent"}
    (message,) = warnings_of(lambda: pipe(**options, **given))
    assert message.startswith(next(iter(given)))
    assert "does nothing" in message


def test_a_warning_names_classes_that_were_not_trained_on() -> None:
    pipe = tiny_dit()
    adapter = new_adapter(pipe.transformer, "lora")
    adapter.metadata = replace(adapter.metadata, sampled={"class_labels": [0, 1, 2]})
    adapter.attach(pipe)
    assert not warnings_of(lambda: pipe([0, 2], num_inference_steps=1, output_type="latent"))
    assert warnings_of(lambda: pipe([0, 7], num_inference_steps=1, output_type="latent")) == [
        "class_labels=7 is not among the classes that this adapter was trained on (0, 1, 2): name one of these, "
        "or train on records of it"
    ]


def test_the_scales_of_a_call_may_differ_between_images() -> None:
    pipe = build("stable_diffusion")
    adapter = adapter_for(pipe.unet).attach(pipe)

    def run(**arguments: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(PROMPTS, num_inference_steps=STEPS, output_type="latent", generator=generators, **arguments).images

    with adapter.guidance_scale([2.0, 5.0]):
        expected = run()
    for scales in ([2.0, 5.0], torch.tensor([2.0, 5.0])):
        torch.testing.assert_close(run(guidance_scale=scales), expected)
    with pytest.raises(UserError, match="3 guidance scales were given for a batch of 2"):
        run(guidance_scale=[2.0, 3.0, 4.0])
