"""A denoiser called by several threads at once: each call keeps its own state."""

from __future__ import annotations

import contextvars
import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.adapters.attachment import ReadersWriterLock
from stages.adapters.scale_overrides import innermost_override
from stages.base.patching import patched
from tests.conftest import VARIANTS
from tests.stages.adapters.test_compositions import adapter_for
from tests.stages.adapters.test_fusing import everywhere
from tests.support.families import PROMPTS, build

STEPS, PATIENCE = 4, 60.0
pytestmark = pytest.mark.filterwarnings("ignore:the guidance is not fused")


def another(pipe: Any) -> Any:
    """Create a pipeline on the same denoiser, as for each request of a server.

    It has a tokenizer of its own: a fast tokenizer keeps how it pads and truncates on itself, and one thread would
    change it under another.
    """
    other = StableDiffusionPipeline.from_pipe(pipe, tokenizer=copy.deepcopy(pipe.tokenizer))
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def final(pipe: Any, scale: float | None = None, **arguments: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generators} | arguments
    return pipe(PROMPTS, **options, **({} if scale is None else {"guidance_scale": scale})).images


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Run each function in a thread of its own; return the results."""
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        try:
            found[i] = works[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "the calls wait for each other"
    for value in found.values():
        if isinstance(value, BaseException):
            raise value
    return [found[i] for i in range(len(works))]


@pytest.fixture
def pipe() -> Any:
    return build("stable_diffusion")


@pytest.mark.parametrize("variant", VARIANTS)
def test_requests_at_two_scales(pipe: Any, variant: str) -> None:
    other = another(pipe)
    adapter_for(pipe.unet, variant).attach(pipe).attach(other)
    alone = final(pipe, 1.5), final(other, 4.0)
    for _ in range(2):
        found = at_once(lambda: final(pipe, 1.5), lambda: final(other, 4.0))
        for one, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("variant", ["lora", "offset", "full"])
def test_a_pipeline_without_an_adapter_shares_the_denoiser(pipe: Any, variant: str) -> None:
    stock = another(pipe)
    expected = final(stock, 3.0, num_inference_steps=8)
    adapter_for(pipe.unet, variant).attach(pipe)
    alone = final(pipe, 4.0)
    found, *ours = at_once(lambda: final(stock, 3.0, num_inference_steps=8), *[lambda: final(pipe, 4.0)])
    assert torch.equal(found, expected)
    torch.testing.assert_close(ours[0], alone)


def test_calls_by_hooks_run_side_by_side(pipe: Any) -> None:
    other, meet = another(pipe), threading.Barrier(2)
    adapter_for(pipe.unet, "offset").attach(pipe).attach(other)
    alone = final(pipe, 2.0), final(other, 5.0)

    def wait(*args: Any) -> dict[str, Any]:
        meet.wait(PATIENCE)
        return {}

    found = at_once(
        lambda: final(pipe, 2.0, callback_on_step_end=wait), lambda: final(other, 5.0, callback_on_step_end=wait)
    )
    for one, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("variant", ["lora", "offset"])
def test_a_context_of_one_thread_does_not_affect_another(pipe: Any, variant: str) -> None:
    other = another(pipe)
    adapter = adapter_for(pipe.unet, variant).attach(pipe).attach(other)
    alone, at_four = final(other, 2.0), final(pipe, 4.0)
    with adapter.guidance_scale(4.0):
        (found,) = at_once(lambda: final(other, 2.0))
        torch.testing.assert_close(found, alone)
        torch.testing.assert_close(final(pipe, 2.0), at_four)
    with adapter.guidance_schedule([1.0] * STEPS):
        (found,) = at_once(lambda: final(other, 2.0))
    torch.testing.assert_close(found, alone)


def test_a_fused_scale_is_not_a_context_of_another_thread(pipe: Any) -> None:
    other = another(pipe)
    adapter = everywhere(pipe).attach(pipe).attach(other).fuse(3.0)
    held = final(other)
    with adapter.guidance_scale(5.0):
        (found,) = at_once(lambda: final(other))
    torch.testing.assert_close(found, held)
    torch.testing.assert_close(final(pipe), held)


@pytest.mark.parametrize("variant", ["lora", "offset"])
def test_a_task_in_a_thread_keeps_its_context(pipe: Any, variant: str) -> None:
    """Run in a copied context, as `asyncio.to_thread` and web frameworks do."""
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    expected = final(pipe, 4.0)
    with adapter.guidance_scale(4.0):
        context = contextvars.copy_context()
        (found,) = at_once(lambda: context.run(final, pipe, 2.0))
    torch.testing.assert_close(found, expected)


def test_contexts_of_two_threads_end_in_any_order(pipe: Any) -> None:
    adapter, inputs = everywhere(pipe).attach(pipe), (torch.randn(2, 4, 8, 8), torch.tensor(500))
    text = torch.randn(2, 12, 32)
    entered, left = threading.Event(), threading.Event()

    @torch.no_grad()
    def predict() -> Tensor:
        return pipe.unet(*inputs, encoder_hidden_states=text).sample

    def at(scale: float) -> Tensor:
        with adapter.guidance_scale(scale):
            return predict()

    plain, two, five = predict(), at(2.0), at(5.0)

    def outer() -> Tensor:
        with adapter.guidance_scale(2.0):
            entered.wait(PATIENCE)
            found = predict()
        left.set()
        return found

    def inner() -> Tensor:
        with adapter.guidance_scale(5.0):
            entered.set()
            left.wait(PATIENCE)
            return predict()

    found = at_once(outer, inner)
    torch.testing.assert_close(found[0], two, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], five, atol=1e-4, rtol=1e-4)
    assert torch.equal(predict(), plain)


@pytest.mark.parametrize("variant", ["lora", "offset", "embedding"])
def test_a_denoiser_alone_in_two_threads(pipe: Any, variant: str) -> None:
    adapter = adapter_for(pipe.unet, variant).attach(pipe.unet)
    inputs, text = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 32)
    meet = threading.Barrier(2)

    @torch.no_grad()
    def predict(scale: float, together: bool = True) -> Tensor:
        with adapter.guidance_scale(scale):
            for _ in range(10 if together else 1):
                if together:
                    meet.wait(PATIENCE)
                found = pipe.unet(inputs, torch.tensor(500), encoder_hidden_states=text).sample
        return found

    expected = [predict(scale, together=False) for scale in (1.0, 4.0)]
    found = at_once(lambda: predict(1.0), lambda: predict(4.0))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_a_schedule_in_one_thread_and_a_scale_in_another(pipe: Any) -> None:
    other = another(pipe)
    adapter = adapter_for(pipe.unet, "cross_attention").attach(pipe).attach(other)
    schedule = [1.0, 3.0, 5.0, 1.0]

    def scheduled() -> Tensor:
        with adapter.guidance_schedule(schedule):
            return final(pipe)

    expected = scheduled(), final(other, 2.0)
    found = at_once(scheduled, lambda: final(other, 2.0))
    for one, of_itself in zip(found, expected, strict=True):
        torch.testing.assert_close(one, of_itself)


def test_a_schedule_waiting_for_its_timesteps_does_not_block_other_threads(pipe: Any) -> None:
    other, begun, ended = another(pipe), threading.Event(), threading.Event()
    adapter = adapter_for(pipe.unet, "cross_attention").attach(pipe).attach(other)
    expected = final(other, 2.0)

    def set_timesteps(own: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
        begun.set()
        ended.wait(PATIENCE)
        own(*args, **kwargs)

    def scheduled() -> Tensor:
        with patched(pipe.scheduler, "set_timesteps", set_timesteps), adapter.guidance_schedule([3.0] * STEPS):
            return final(pipe)

    def meanwhile() -> Tensor:
        begun.wait(PATIENCE)
        try:
            return final(other, 2.0)
        finally:
            ended.set()

    torch.testing.assert_close(at_once(scheduled, meanwhile)[1], expected)


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_detaching_waits_for_a_running_call(pipe: Any, variant: str) -> None:
    adapter, begun = adapter_for(pipe.unet, variant).attach(pipe), threading.Event()
    expected = final(pipe, 4.0)

    def begin(*args: Any) -> dict[str, Any]:
        begun.set()
        return {}

    def detach() -> None:
        begun.wait(PATIENCE)
        adapter.detach()

    found, _ = at_once(lambda: final(pipe, 4.0, callback_on_step_end=begin), detach)
    torch.testing.assert_close(found, expected)
    assert type(pipe) is StableDiffusionPipeline


def test_blocks_that_autograd_reruns_in_its_own_thread_are_guided(pipe: Any) -> None:
    """Run in another thread, as the backward pass on a GPU does."""
    adapter = adapter_for(pipe.unet, "offset").attach(pipe.unet)
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    inputs, text = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 32)

    def gradients(backward: Callable[[Tensor], Any]) -> list[Tensor]:
        adapter.zero_grad()
        with adapter.guidance_scale(3.0):
            loss = pipe.unet(inputs, torch.tensor(500), encoder_hidden_states=text).sample.square().sum()
            backward(loss)
        return [parameter.grad.clone() for parameter in adapter.sites.parameters() if parameter.grad is not None]

    same_thread = gradients(lambda loss: loss.backward())
    other_thread = gradients(lambda loss: at_once(loss.backward))
    assert same_thread
    for one, other in zip(same_thread, other_thread, strict=True):
        torch.testing.assert_close(one, other)


def test_an_adapter_of_a_copy_on_another_thread(pipe: Any) -> None:
    adapter_for(pipe.unet, "offset").attach(pipe)
    again = copy.deepcopy(pipe)
    expected = final(pipe, 2.0), final(again, 5.0)
    found = at_once(lambda: final(pipe, 2.0), lambda: final(again, 5.0))
    for one, of_itself in zip(found, expected, strict=True):
        torch.testing.assert_close(one, of_itself)


def test_a_call_leaves_no_state_on_the_adapter(pipe: Any) -> None:
    adapter: GuidanceAdapter = adapter_for(pipe.unet, "offset").attach(pipe)
    final(pipe, 3.0)
    assert adapter.guidance is None
    assert adapter.prepared is None
    assert adapter.gate is None
    assert innermost_override(adapter) is None
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_a_schedule_and_a_scale_the_innermost_counts(pipe: Any) -> None:
    adapter = adapter_for(pipe.unet, "offset").attach(pipe)
    three, five = final(pipe, 3.0), final(pipe, 5.0)
    with adapter.guidance_schedule([5.0] * STEPS):
        torch.testing.assert_close(final(pipe, 2.0), five)
        with adapter.guidance_scale(3.0):
            assert torch.equal(final(pipe, 2.0), three)
        torch.testing.assert_close(final(pipe, 2.0), five)
    with adapter.guidance_scale(3.0), adapter.guidance_schedule([5.0] * STEPS):
        torch.testing.assert_close(final(pipe, 2.0), five)


def test_the_exclusive_lock_waits_for_shared_ones_and_is_reentrant() -> None:
    lock, order, together = ReadersWriterLock(), [], threading.Event()

    def first() -> None:
        with lock.shared(), lock.shared():
            together.set()
            threading.Event().wait(0.1)
            order.append("together")

    def second() -> None:
        together.wait(PATIENCE)
        with lock.exclusive(), lock.exclusive(), lock.shared():
            order.append("alone")

    at_once(first, second)
    assert order == ["together", "alone"]


def test_warnings_name_the_line_that_they_are_about(pipe: Any) -> None:
    adapter_for(pipe.unet, "offset").attach(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        final(pipe, 50.0)
    assert [warning.filename for warning in caught if "is outside the range" in str(warning.message)] == [__file__]
