from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline

from stages.adapters import GuidanceAdapter
from stages.base.hooks import count_evaluations
from stages.base.sampling import undecoded
from stages.errors import UserError
from tests.conftest import tiny_dit
from tests.stages.adapters.test_contract import new_adapter

LABELS = [1, 2, 3]
STEPS = 4


def final(pipe: DiTPipeline, scale: float | None = None, steps: int = STEPS) -> tuple[torch.Tensor, int]:
    """Return the final latents, and the number of denoiser evaluations."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(LABELS))]
    options = {} if scale is None else {"guidance_scale": scale}
    with undecoded(pipe) as latents, count_evaluations(pipe.transformer) as count:
        pipe(LABELS, generator=generators, num_inference_steps=steps, output_type="pt", **options)
    return latents[0], count[0]


@pytest.fixture
def pipe() -> DiTPipeline:
    return tiny_dit()


@pytest.fixture
def adapter(pipe: DiTPipeline) -> GuidanceAdapter:
    return new_adapter(pipe.transformer, "lora")


def test_attached_a_pipeline_makes_half_the_evaluations(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    _, two_passes = final(pipe, 3.0)
    adapter.attach(pipe)
    _, one_pass = final(pipe, 3.0)
    assert (two_passes, one_pass) == (2 * STEPS * len(LABELS), STEPS * len(LABELS))


def test_its_guidance_scale_is_the_adapters(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    unguided, _ = final(pipe, 1.0)
    adapter.attach(pipe)
    assert torch.equal(final(pipe, 1.0)[0], unguided)
    at_default, at_two = final(pipe)[0], final(pipe, 2.0)[0]
    assert torch.equal(at_default, final(pipe, 4.0)[0])
    assert not torch.allclose(at_two, at_default, atol=1e-3)
    with adapter.guidance_scale(1.0):
        assert torch.equal(final(pipe, 3.0)[0], unguided)
    with adapter.guidance_scale([2.0, 4.0, 1.0]):
        mixed, _ = final(pipe)
    for i, alone in enumerate([at_two, at_default, unguided]):
        torch.testing.assert_close(mixed[i], alone[i], atol=1e-3, rtol=1e-3)


def test_attached_twice_is_refused(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    with pytest.raises(UserError, match="attached already: detach it first"):
        adapter.attach(pipe)


def test_a_pipeline_has_one_adapter_and_its_copy_the_same_one(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    again = copy.deepcopy(pipe)
    other = new_adapter(pipe.transformer, "offset")
    for carrying in (pipe, again):
        with pytest.raises(UserError, match="this DiTTransformer2DModel carries an adapter already"):
            other.attach(carrying)
    adapter.detach()
    with pytest.raises(UserError, match="carries an adapter already"):
        adapter.attach(again)
    other.attach(pipe)


def test_a_replaced_denoiser_is_noticed(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    pipe.transformer = tiny_dit().transformer
    with pytest.raises(
        UserError,
        match="the adapter is not attached to this DiTTransformer2DModel: the pipeline's denoiser was replaced",
    ):
        final(pipe, 3.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), [], "much", None])
def test_an_invalid_scale_is_named(pipe: DiTPipeline, adapter: GuidanceAdapter, scale: Any) -> None:
    adapter.attach(pipe)
    with pytest.raises(UserError, match="guidance_scale=.*: give a"), adapter.guidance_scale(scale):
        pass
    with pytest.raises(UserError, match="guidance_scale=.*: give a"), adapter.guidance_schedule(lambda *_: scale):
        final(pipe)


@pytest.mark.parametrize("schedule", [2.0, [[1.0, 2.0, 3.0], [1.0, 2.0], 1.0, 1.0]])
def test_an_invalid_schedule_is_named(pipe: DiTPipeline, adapter: GuidanceAdapter, schedule: Any) -> None:
    adapter.attach(pipe)
    with pytest.raises(UserError, match=r"one per step|one per image"), adapter.guidance_schedule(schedule):
        final(pipe)


def test_a_schedule_outside_the_trained_range_warns_and_the_replaced_scale_does_not(
    pipe: DiTPipeline, adapter: GuidanceAdapter
) -> None:
    adapter.attach(pipe)
    with (
        pytest.warns(UserWarning, match="guidance_scale 50 is outside the range 1 to 6"),
        adapter.guidance_schedule([50.0] * STEPS),
    ):
        final(pipe)
    with warnings.catch_warnings(), adapter.guidance_schedule([2.0] * STEPS):
        warnings.simplefilter("error", UserWarning)
        final(pipe, 20.0)


def test_detached_it_is_the_stock_pipeline_again(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    before = final(pipe, 3.0)
    adapter.attach(pipe)
    assert type(pipe).__name__ == "DiTPipeline"
    adapter.detach()
    assert type(pipe) is DiTPipeline
    after = final(pipe, 3.0)
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_an_attached_pipeline_is_saved_as_the_stock_one(
    pipe: DiTPipeline, adapter: GuidanceAdapter, tmp_path: Path
) -> None:
    adapter.attach(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert type(again) is DiTPipeline
    assert all(
        torch.equal(a, b) for a, b in zip(again.transformer.parameters(), pipe.transformer.parameters(), strict=True)
    )
    assert isinstance(copy.copy(pipe), DiTPipeline)


def test_a_schedule_gives_every_step_its_scale(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    unguided, _ = final(pipe, 1.0)
    adapter.attach(pipe)
    guided, _ = final(pipe, 3.0)
    seen: list[tuple[int, float]] = []

    def interval(step: int, timestep: float) -> float:
        seen.append((step, timestep))
        return 3.0 if 1 <= step < 3 else 1.0

    made = {}
    for name, schedule in {"flat": [3.0] * STEPS, "off": [1.0] * STEPS, "list": [1, 3, 3, 1], "rule": interval}.items():
        with adapter.guidance_schedule(schedule):
            made[name], evaluations = final(pipe)
        assert evaluations == STEPS * len(LABELS)
    torch.testing.assert_close(made["flat"], guided)
    assert torch.equal(made["off"], unguided)
    assert torch.equal(made["list"], made["rule"])
    assert seen == [(i, float(t)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert not torch.allclose(made["list"], guided, atol=1e-3)
    assert not torch.allclose(made["list"], unguided, atol=1e-3)
    torch.testing.assert_close(final(pipe, 3.0)[0], guided)


def test_a_schedule_may_hold_a_scale_per_image(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    with adapter.guidance_schedule([[2.0, 3.0, 1.0]] * STEPS):
        by_schedule, _ = final(pipe)
    with adapter.guidance_scale([2.0, 3.0, 1.0]):
        torch.testing.assert_close(by_schedule, final(pipe)[0])


def test_a_schedule_of_another_length_is_refused_without_a_trace(pipe: DiTPipeline, adapter: GuidanceAdapter) -> None:
    with pytest.raises(UserError, match="a schedule of scales needs a pipeline"), adapter.guidance_schedule([2.0]):
        pass
    adapter.attach(pipe)
    before, _ = final(pipe, 3.0)
    with (
        pytest.raises(UserError, match="3 guidance scales were given for 4 steps: give one per step"),
        adapter.guidance_schedule([2.0, 3.0, 4.0]),
    ):
        final(pipe)
    of_one: Any = lambda step: 2.0  # noqa: E731
    with pytest.raises(UserError, match="is a function of the step and the timestep: too many"):
        adapter.guidance_schedule(of_one).__enter__()
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert torch.equal(final(pipe, 3.0)[0], before)
