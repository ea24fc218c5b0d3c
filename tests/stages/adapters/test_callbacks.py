"""Callbacks that change guidance or prompts during a call: applied, or warned about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.adapters.metadata import AdapterMetadata, Base
from tests.pipelines_zoo.gathered import gather
from tests.stages.adapters.test_compositions import adapter_for
from tests.support.families import PROMPTS, build

STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore:the guidance is not fused")


def final(pipe: Any, scale: float = 3.0, n: int = 2, **arguments: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generators} | arguments
    return pipe(PROMPTS[:n], guidance_scale=scale, **options).images


@pytest.fixture
def pipe() -> Any:
    return build("stable_diffusion")


@pytest.fixture(params=["lora", "offset"])
def adapter(pipe: Any, request: pytest.FixtureRequest) -> GuidanceAdapter:
    return adapter_for(pipe.unet, request.param).attach(pipe)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def after(step: int, change: Callable[[Any, dict[str, Any]], None]) -> dict[str, Any]:
    """Return a callback that makes a change after a given step."""

    def callback(pipe: Any, i: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            change(pipe, kwargs)
        return kwargs

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def cut(pipe: Any, kwargs: dict[str, Any]) -> None:
    pipe._guidance_scale = 0.0


def cut_and_take_the_last(pipe: Any, kwargs: dict[str, Any]) -> None:
    pipe._guidance_scale = 0.0
    kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]


def cut_and_take_the_half(pipe: Any, kwargs: dict[str, Any]) -> None:
    pipe._guidance_scale = 1.0
    kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]


def cut_and_leave_the_first(pipe: Any, kwargs: dict[str, Any]) -> None:
    pipe._guidance_scale = 0
    kwargs["prompt_embeds"] = kwargs["prompt_embeds"][1:]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("change", [cut, cut_and_take_the_last, cut_and_take_the_half, cut_and_leave_the_first])
def test_guidance_that_a_callback_cuts_off_ends_at_that_step(
    pipe: Any, adapter: GuidanceAdapter, change: Any, n: int
) -> None:
    found = final(pipe, n=n, **after(1, change))
    with adapter.guidance_schedule([3.0, 3.0, 1.0, 1.0]):
        expected = final(pipe, n=n)
    torch.testing.assert_close(found, expected)
    assert difference(found, final(pipe, n=n)) > 1e-4 + 10 * difference(found, expected)


def test_diffusers_own_cutoff(pipe: Any, adapter: GuidanceAdapter) -> None:
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    with adapter.guidance_schedule([3.0, 3.0, 1.0, 1.0]):
        expected = final(pipe, n=1)
    torch.testing.assert_close(final(pipe, n=1, callback_on_step_end=callback), expected)
    several = MultiPipelineCallbacks([callback])
    torch.testing.assert_close(final(pipe, n=1, callback_on_step_end=several), expected)


def test_a_cutoff_with_further_embeddings_in_the_batch() -> None:
    pipe = build("stable_diffusion_xl")
    adapter = adapter_for(pipe.unet).attach(pipe)
    callback = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    found = final(pipe, callback_on_step_end=callback)
    with adapter.guidance_schedule([3.0, 3.0, 1.0, 1.0]):
        torch.testing.assert_close(found, final(pipe))


def test_a_changed_scale_is_the_adapters(pipe: Any, adapter: GuidanceAdapter) -> None:
    seen: list[float] = []

    def turn(pipe: Any, kwargs: dict[str, Any]) -> None:
        seen.append(pipe.guidance_scale)
        pipe._guidance_scale = pipe.guidance_scale * 0.5

    found = final(pipe, 6.0, **after(1, turn))
    with adapter.guidance_schedule([6.0, 6.0, 3.0, 3.0]):
        torch.testing.assert_close(found, final(pipe), atol=1e-4, rtol=1e-4)
    assert seen == [6.0]


def test_a_scale_per_image_is_changed_for_each(pipe: Any, adapter: GuidanceAdapter) -> None:
    def turn(pipe: Any, kwargs: dict[str, Any]) -> None:
        pipe._guidance_scale = pipe._guidance_scale * 0.5

    with adapter.guidance_scale([6.0, 4.0]):
        found = final(pipe, **after(1, turn))
    with adapter.guidance_schedule([[6.0, 4.0], [6.0, 4.0], [3.0, 2.0], [3.0, 2.0]]):
        torch.testing.assert_close(found, final(pipe), atol=1e-4, rtol=1e-4)


def test_a_schedule_is_cut_off_too_and_callbacks_see_its_scales(pipe: Any, adapter: GuidanceAdapter) -> None:
    seen: list[float] = []

    def look(pipe: Any, i: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipe.guidance_scale)
        if i == 1:
            pipe._guidance_scale = 0.0
        return {}

    with adapter.guidance_schedule([1.0, 2.0, 3.0, 4.0]):
        found = final(pipe, callback_on_step_end=look)
    assert seen == [1.0, 2.0, 1.0, 1.0]
    with adapter.guidance_schedule([1.0, 2.0, 1.0, 1.0]):
        torch.testing.assert_close(found, final(pipe))


def test_a_callback_that_only_reads_changes_nothing(pipe: Any, adapter: GuidanceAdapter) -> None:
    seen: list[float] = []
    look = after(1, lambda pipe, kwargs: seen.append(pipe.guidance_scale))
    assert torch.equal(final(pipe, 4.0, **look), final(pipe, 4.0))
    assert seen == [4.0]


@pytest.mark.parametrize("doubled", [False, True])
def test_prompts_that_a_callback_changes(pipe: Any, adapter: GuidanceAdapter, doubled: bool) -> None:
    embeds = torch.randn(2, 12, 32) * 5

    def swap(pipe: Any, kwargs: dict[str, Any]) -> None:
        kwargs["prompt_embeds"] = torch.cat([torch.zeros_like(embeds), embeds]) if doubled else embeds

    found = final(pipe, **after(1, swap))
    expected = final(pipe, **after(1, lambda pipe, kwargs: kwargs["prompt_embeds"].copy_(embeds)))
    torch.testing.assert_close(found, expected)
    assert difference(found, final(pipe)) > 1e-3


def test_a_warning_names_changes_of_a_callback_without_effect(pipe: Any, adapter: GuidanceAdapter) -> None:
    def rescale(pipe: Any, kwargs: dict[str, Any]) -> None:
        pipe._guidance_rescale = 0.7

    with pytest.warns(UserWarning, match="a callback set guidance_rescale to 0.7, which does not change an adapter's"):
        found = final(pipe, **after(1, rescale))
    assert torch.equal(found, final(pipe))


def test_a_failing_callback_leaves_the_pipeline_unchanged(pipe: Any, adapter: GuidanceAdapter) -> None:
    before = final(pipe)

    def fail(pipe: Any, kwargs: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        final(pipe, **after(1, fail))
    assert torch.equal(final(pipe), before)


def test_a_callback_changes_a_guider_or_cuts_it_off() -> None:
    specimen = gather()["MotifVideoPipeline"]
    pipe = specimen.build()
    metadata = AdapterMetadata(conditions={}, base=Base(denoiser_subfolder="transformer"), scale_range=[1.0, 9.0])
    adapter = adapter_for(pipe.transformer, metadata=metadata).attach(pipe)

    def run(**arguments: Any) -> Tensor:
        info = dict(specimen.arguments) | {"num_inference_steps": 3, "output_type": "latent"} | arguments
        return pipe(**specimen.conditions[0], generator=torch.Generator().manual_seed(0), **info).frames

    def turned(change: Callable[[Any], None]) -> Tensor:
        def callback(pipe: Any, i: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if i == 0:
                change(pipe.guider)
            return kwargs

        return run(guidance_scale=4.0, callback_on_step_end=callback)

    def halve(guider: Any) -> None:
        guider.guidance_scale = guider.guidance_scale / 2

    for change, schedule in ((lambda guider: guider.disable(), [4.0, 1.0, 1.0]), (halve, [4.0, 2.0, 2.0])):
        found = turned(change)
        with adapter.guidance_schedule(schedule):
            torch.testing.assert_close(found, run())
    assert pipe.guider._enabled


def test_nothing_is_warned_about_if_nothing_is_changed(pipe: Any, adapter: GuidanceAdapter) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        final(pipe, **after(1, cut))
