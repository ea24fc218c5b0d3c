"""Wrappers and copies of a pipeline with an adapter: supported, or refused in one line."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from stages.adapters import GuidanceAdapter
from stages.adapters.wrappers import hookable_module, is_compiled, unwrapped
from stages.errors import UserError
from tests.stages.adapters.test_compositions import adapter_for, final, unlike
from tests.support.families import build

INPUTS, TEXT = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 32)


@torch.no_grad()
def predict(denoiser: Any) -> Tensor:
    return denoiser(INPUTS, torch.tensor(500), encoder_hidden_states=TEXT).sample


@pytest.fixture
def pipe() -> Any:
    return build("stable_diffusion")


def in_peft(unet: nn.Module) -> nn.Module:
    return get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "to_v"]))


def in_parallel(unet: nn.Module) -> nn.Module:
    return nn.DataParallel(unet)


def compiled(unet: nn.Module) -> Any:
    return torch.compile(unet, backend="eager")


def in_both(unet: nn.Module) -> Any:
    return compiled(in_peft(unet))


@pytest.mark.parametrize(
    ("wrap", "variant"),
    [
        (in_peft, "lora"),
        (in_peft, "offset"),
        (in_parallel, "offset"),
        (compiled, "lora"),  # test_compositions.py tests hooks there
        pytest.param(in_both, "lora", marks=pytest.mark.long),
    ],
)
def test_a_wrapped_denoiser_is_unwrapped(pipe: Any, wrap: Any, variant: str) -> None:
    torch.compiler.reset()
    adapter = adapter_for(pipe.unet, variant)
    plain, bare = predict(pipe.unet), pipe.unet
    adapter.attach(bare)
    with adapter.guidance_scale(3.0):
        expected = predict(bare)
    adapter.detach()
    wrapped = wrap(bare)
    assert unwrapped(wrapped) is bare
    adapter.attach(wrapped)
    with adapter.guidance_scale(3.0):
        torch.testing.assert_close(predict(wrapped), expected, atol=1e-5, rtol=1e-4)
    adapter.detach()
    torch.testing.assert_close(predict(wrapped), plain)
    assert not torch.allclose(expected, plain, atol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "offset"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pipeline_whose_denoiser_peft_wraps(pipe: Any, variant: str, when: str) -> None:
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    expected, plain = final(pipe), final(pipe, 1.0)
    if when == "before":
        adapter.detach()
    pipe.unet = in_peft(pipe.unet)
    if when == "before":
        adapter.attach(pipe)
    torch.testing.assert_close(final(pipe), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(final(pipe, 1.0), plain)
    adapter.detach()
    torch.testing.assert_close(final(pipe, 1.0), plain)


def test_copies_that_run_in_threads_of_their_own_are_refused(pipe: Any) -> None:
    wrapped = nn.DataParallel(pipe.unet)
    wrapped.device_ids = [0, 1]
    with pytest.raises(
        UserError, match="DataParallel runs copies of the denoiser, .* use its `module`, or one process per GPU"
    ):
        adapter_for(pipe.unet).attach(wrapped)


def test_compiled_denoisers_are_recognized(pipe: Any) -> None:
    assert not is_compiled(pipe.unet)
    assert is_compiled(compiled(pipe.unet))
    assert hookable_module(compiled(pipe.unet)) is pipe.unet
    wrapped = in_peft(pipe.unet)
    assert hookable_module(compiled(wrapped)) is wrapped
    pipe.unet.mid_block.compile(backend="eager")
    assert is_compiled(wrapped)


@pytest.mark.parametrize("variant", ["offset", "cross_attention"])
def test_individually_compiled_blocks(pipe: Any, variant: str) -> None:
    torch.compiler.reset()
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    expected, plain = final(pipe), final(pipe, 1.0)
    pipe.unet.mid_block.compile(backend="eager")
    torch.testing.assert_close(final(pipe), expected)
    torch.testing.assert_close(final(pipe, 1.0), plain)
    adapter.detach()


# Pickles and copies


@pytest.mark.parametrize("variant", ["lora", "offset"])
def test_pickling_a_pipeline_with_an_adapter_is_a_one_line_error(pipe: Any, variant: str) -> None:
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    for save in (pickle.dumps, lambda carried: torch.save(carried, io.BytesIO())):
        with pytest.raises(
            UserError, match="a StableDiffusionPipeline with an adapter attached cannot be pickled: detach"
        ):
            save(pipe)
        with pytest.raises(UserError, match="a denoiser that carries an adapter cannot be pickled: detach the adapter"):
            save(pipe.unet)
    expected = final(pipe)
    adapter.detach()
    again = pickle.loads(pickle.dumps(pipe))
    assert type(again) is StableDiffusionPipeline
    adapter.attach(again)
    torch.testing.assert_close(final(again), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda a: pickle.loads(pickle.dumps(a))])
def test_an_adapter_that_is_attached_can_be_copied_and_pickled(pipe: Any, duplicate: Any) -> None:
    adapter: GuidanceAdapter = adapter_for(pipe.unet, "offset").attach(pipe)
    expected = final(pipe)
    again = duplicate(adapter)
    assert again.denoiser is None
    adapter.detach()
    again.attach(pipe)
    assert torch.equal(final(pipe), expected)


def test_a_shallow_copy_of_a_pipeline_is_guided_too(pipe: Any) -> None:
    adapter = adapter_for(pipe.unet).attach(pipe)
    again = copy.copy(pipe)
    assert torch.equal(final(again), final(pipe))
    adapter.detach()
    with pytest.raises(UserError, match="or the adapter was detached meanwhile: detach it, and attach it again"):
        final(again)
    adapter.attach(again)
    assert unlike(final(again), final(again, 1.0))


# References


@pytest.mark.parametrize("variant", ["lora", "offset"])
def test_an_attached_pipeline_is_not_kept_alive(variant: str) -> None:
    pipe: Any = build("stable_diffusion")
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    expected = final(pipe)
    references = [weakref.ref(pipe), weakref.ref(pipe.unet)]
    del pipe
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    anew: Any = build("stable_diffusion")
    adapter.attach(anew)
    assert torch.equal(final(anew), expected)
    adapter.detach()


def test_deleting_another_pipeline_of_the_denoiser_leaves_the_first_guided(pipe: Any) -> None:
    other = StableDiffusionPipeline.from_pipe(pipe)
    adapter = adapter_for(pipe.unet).attach(pipe).attach(other)
    expected = final(pipe)
    del other
    gc.collect()
    assert adapter.pipelines == [pipe]
    assert torch.equal(final(pipe), expected)
    adapter.detach()
    assert type(pipe) is StableDiffusionPipeline
