"""A fused scale: the result of hooks, at the base's cost, and restored exactly."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter, fusing
from stages.adapters.attachment import attachment_of
from stages.base.denoiser import denoiser_of, fingerprint, unflatten
from stages.errors import UserError
from tests.stages.adapters.test_compositions import METADATA, STEPS, adapter_for, final, unlike
from tests.stages.adapters.test_layers import inputs_of
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def everywhere(pipe: Any, inputs: dict[str, Any] | None = None) -> GuidanceAdapter:
    """Create a LoRA at every linear and convolutional layer, as if it were trained."""
    torch.manual_seed(1)
    config = AdapterConfig("lora", ["*"], hidden_size=16, rank=4)
    adapter = GuidanceAdapter.for_denoiser(config, denoiser_of(pipe)[1], METADATA, inputs)
    for name, parameter in adapter.sites.named_parameters():
        nn.init.normal_(parameter, mean=0.3 if name.endswith("curves") else 0.0, std=0.05)
    return adapter


def hooks_of(denoiser: nn.Module) -> int:
    """Count the hooks that guide, without those that acquire the lock."""
    every = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in denoiser.modules())
    return every - len(attachment_of(denoiser).guards)


@pytest.fixture
def pipe() -> Any:
    return build("stable_diffusion")


@pytest.fixture
def adapter(pipe: Any) -> GuidanceAdapter:
    return everywhere(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_hooks_and_leaves_no_trace(family: str) -> None:
    pipe = build(family)
    denoiser: Any = denoiser_of(pipe)[1]
    inputs = inputs_of(pipe, prompt=PROMPTS, **ARGUMENTS.get(family, {}))
    adapter = everywhere(pipe, inputs).attach(denoiser)

    def predict() -> Tensor:
        with torch.no_grad():
            return denoiser(**unflatten(inputs | {"return_dict": False}))[0]

    with adapter.guidance_scale(3.0):
        hooked = predict()
    with adapter.guidance_scale(1.0):
        plain = predict()
    before = fingerprint(denoiser)
    adapter.fuse(3.0)
    assert not hooks_of(denoiser)
    torch.testing.assert_close(predict(), hooked, **CLOSE)
    assert unlike(hooked, plain)
    adapter.unfuse()
    assert fingerprint(denoiser) == before
    assert torch.equal(predict(), plain)


def test_a_call_fuses_its_scale_and_restores_the_base(pipe: Any, adapter: GuidanceAdapter) -> None:
    before, plain = fingerprint(pipe.unet), final(pipe, 1.0)
    adapter.attach(pipe)
    seen: list[tuple[int, str]] = []

    def look(*_: Any) -> dict[str, Any]:
        seen.append((hooks_of(pipe.unet), fingerprint(pipe.unet)))
        return {}

    guided = final(pipe, 3.0, callback_on_step_end=look)
    assert adapter.fused is True
    assert {hooks for hooks, _ in seen} == {0}
    assert before not in {weights for _, weights in seen}
    assert fingerprint(pipe.unet) == before
    assert unlike(guided, plain)
    assert torch.equal(final(pipe, 1.0), plain)
    assert unlike(final(pipe, 5.0), guided)
    assert torch.equal(final(pipe, 3.0), guided)


@pytest.mark.parametrize("held", [None, 2.0])
def test_an_exception_in_the_middle_of_a_call_restores_bit_for_bit(
    pipe: Any, adapter: GuidanceAdapter, held: float | None
) -> None:
    adapter.attach(pipe)
    if held is not None:
        adapter.fuse(held)
    before = fingerprint(pipe.unet)

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        final(pipe, 3.0, callback_on_step_end=fail)
    assert fingerprint(pipe.unet) == before
    adapter.detach()
    assert fingerprint(pipe.unet) == fingerprint(build("stable_diffusion").unet)


def test_a_fused_scale_applies_to_calls_without_a_scale(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    three, five, plain = final(pipe, 3.0), final(pipe, 5.0), final(pipe, 1.0)
    adapter.fuse(3.0)
    held = fingerprint(pipe.unet)

    def unnamed() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        return pipe(PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="latent").images

    torch.testing.assert_close(unnamed() / pipe.vae.config.scaling_factor, three)
    for scale, expected in ((5.0, five), (1.0, plain), (3.0, three)):
        assert torch.equal(final(pipe, scale), expected)
        assert fingerprint(pipe.unet) == held
    adapter.fuse(5.0)
    assert torch.equal(final(pipe, 5.0), five)
    adapter.unfuse()
    assert torch.equal(final(pipe, 1.0), plain)


def test_strength_multiplies_the_change(pipe: Any, adapter: GuidanceAdapter) -> None:
    name = "down_blocks.0.resnets.0.conv1"
    weight = pipe.unet.get_submodule(name).weight
    own = weight.detach().clone()
    down, up = adapter.lora_weights(3.0)[name]
    adapter.attach(pipe)
    for strength in (0.0, 0.5, 1.0, -1.0):
        adapter.fuse(3.0, strength=strength)
        torch.testing.assert_close(weight, own + strength * torch.einsum("or,rihw->oihw", up.flatten(1), down))
    assert unlike(final(pipe, 3.0), final(pipe, 2.0))


def test_one_copy_is_kept_on_request(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe, backup_device="cpu").fuse(3.0)
    kept = vars(pipe.unet)["_guidance_attachment"].weights.originals
    assert set(kept) == set(adapter.shapes)
    assert all(tensor.shape == pipe.unet.get_submodule(name).weight.shape for name, tensor in kept.items())
    adapter.unfuse()
    assert vars(pipe.unet)["_guidance_attachment"].weights is None


def test_a_lack_of_memory_for_the_copy_changes_nothing(
    pipe: Any, adapter: GuidanceAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copied, to = fingerprint(pipe.unet), [], Tensor.to

    def full(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied.append(1)
        if len(copied) > 5 and kwargs.get("copy"):
            raise torch.OutOfMemoryError
        return to(tensor, *args, **kwargs)

    adapter.attach(pipe)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match='no memory left to keep .* backup_device="cpu"'),
    ):
        patch.setattr(Tensor, "to", full)
        adapter.fuse(3.0)
    assert fingerprint(pipe.unet) == before
    assert unlike(final(pipe, 3.0), final(pipe, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_and_restored(pipe: Any, adapter: GuidanceAdapter, dtype: torch.dtype) -> None:
    exact = {name: up.flatten(1) @ down.flatten(1) for name, (down, up) in adapter.lora_weights(3.0).items()}
    pipe.to(dtype=dtype)
    before = fingerprint(pipe.unet)
    own = {name: pipe.unet.get_submodule(name).weight.detach().float() for name in exact}
    adapter.attach(pipe).fuse(3.0)
    for name, delta in exact.items():
        expected = (own[name] + delta.view_as(own[name])).to(dtype)
        assert torch.equal(pipe.unet.get_submodule(name).weight, expected)
    adapter.unfuse()
    assert fingerprint(pipe.unet) == before


def test_schedules_fuse_each_scale(pipe: Any, adapter: GuidanceAdapter) -> None:
    before, plain = fingerprint(pipe.unet), final(pipe, 1.0)
    adapter.attach(pipe)
    three = final(pipe, 3.0)
    weights: list[str] = []

    def look(*_: Any) -> dict[str, Any]:
        weights.append(fingerprint(pipe.unet))
        return {}

    def run(schedule: Any) -> Tensor:
        weights.clear()
        with adapter.guidance_schedule(schedule):
            latents = final(pipe, 9.0, callback_on_step_end=look)
        assert adapter.fused is True
        assert fingerprint(pipe.unet) == before
        return latents

    assert torch.equal(run([3.0] * STEPS), three)
    assert len(set(weights)) == 1
    assert torch.equal(run([1.0] * STEPS), plain)
    assert set(weights) == {before}
    interval = run([1.0, 3.0, 1.0])
    assert [found == before for found in weights] == [True, False, True]
    assert unlike(interval, three)
    with warnings.catch_warnings(), adapter.guidance_schedule([[1.0, 1.0], [3.0, 3.0001], [1.0, 1.0]]):
        warnings.simplefilter("ignore", UserWarning)
        hooked = final(pipe, 9.0)
    assert adapter.fused is False
    torch.testing.assert_close(hooked, interval, atol=1e-2, rtol=1e-2)


def test_a_schedule_covers_the_steps_that_image_to_image_skips(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    adapter.attach(other)
    picture = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    options = {"image": picture, "strength": 0.5, "num_inference_steps": 6}
    with adapter.guidance_schedule([9.0] * 3 + [2.0] * 3), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        late = final(other, 1.0, **options)
    assert torch.equal(late, final(other, 2.0, **options))


def test_a_lora_of_the_user_composes_and_changed_weights_are_noticed(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    wrapped = copy.deepcopy(pipe.unet)
    wrapped.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"]))
    weights = {name: torch.randn_like(value) * 0.2 for name, value in get_peft_model_state_dict(wrapped).items()}
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=weights)
    adapter = everywhere(pipe).attach(pipe)
    alone = final(pipe)
    pipe.load_lora_weights(tmp_path)
    both = final(pipe)
    assert adapter.fused is True
    with warnings.catch_warnings(), adapter.guidance_scale([3.0, 3.0001]):
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(final(pipe), both, atol=1e-2, rtol=1e-2)
    assert unlike(both, alone)
    adapter.fuse(3.0)
    pipe.fuse_lora()
    with pytest.raises(UserError, match=r"was changed while the guidance was fused into it, .* undo that change first"):
        adapter.unfuse()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    adapter.fuse(3.0)
    torch.testing.assert_close(final(pipe), alone, atol=1e-3, rtol=1e-3)


def test_an_offloaded_denoiser_stays_fused(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    guided = final(pipe)
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device=torch.device("cpu"))
    assert torch.equal(final(pipe), guided)
    assert adapter.fused is True


def sequentially(unet: Any) -> None:
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))


def in_groups(unet: Any) -> None:
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def layer_by_layer(unet: Any) -> None:
    apply_layerwise_casting(unet, torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sequentially, "is offloaded on its own"),
        (in_groups, "its layers are offloaded in groups"),
        (layer_by_layer, "or cast one by one"),
    ],
)
def test_an_adapter_that_cannot_be_fused_runs_by_hooks_and_warns_once(
    pipe: Any, adapter: GuidanceAdapter, change: Any, reason: str
) -> None:
    adapter.attach(pipe)
    guided = final(pipe)
    change(pipe.unet)
    with pytest.warns(UserWarning, match=f"the guidance is not fused, so each pass costs more: .*{reason}"):
        hooked = final(pipe)
    assert adapter.fused is False
    torch.testing.assert_close(hooked, guided, atol=0.5, rtol=5e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        final(pipe)
    with pytest.raises(UserError, match=f"guidance_scale=3.0 cannot be fused: .*{reason}"):
        adapter.fuse(3.0)


def test_a_scale_per_image_runs_by_hooks_and_the_next_call_is_fused(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    two, five = final(pipe, 2.0), final(pipe, 5.0)
    warned = pytest.warns(UserWarning, match="the images of a batch have scales of their own")
    with warned, adapter.guidance_scale([2.0, 5.0]):
        both = final(pipe)
    assert adapter.fused is False
    torch.testing.assert_close(both, torch.stack([two[0], five[1]]), atol=1e-2, rtol=1e-2)
    assert torch.equal(final(pipe, 2.0), two)
    assert adapter.fused is True
    assert not hooks_of(pipe.unet)
    with adapter.guidance_scale([2.0, 2.0]):
        assert torch.equal(final(pipe), two)


def test_a_context_also_fuses_for_direct_calls_of_the_denoiser(pipe: Any, adapter: GuidanceAdapter) -> None:
    inputs = unflatten(inputs_of(pipe, prompt=PROMPTS) | {"return_dict": False})
    adapter.attach(pipe)
    with torch.no_grad():
        plain = pipe.unet(**inputs)[0]
        with adapter.guidance_scale(3.0):
            assert unlike(pipe.unet(**inputs)[0], plain)
        assert torch.equal(pipe.unet(**inputs)[0], plain)


def test_a_compiled_denoiser_takes_every_scale_without_recompiling(pipe: Any, adapter: GuidanceAdapter) -> None:
    torch.compiler.reset()
    compiled: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(1)
        return graph.forward

    adapter.attach(pipe)
    expected = {scale: final(pipe, scale) for scale in (1.0, 2.0, 3.0)}
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    for scale in (2.0, 3.0, 1.0, 2.0):
        torch.testing.assert_close(final(pipe, scale), expected[scale], atol=1e-3, rtol=1e-3)
    with adapter.guidance_schedule([3.0, 1.0, 2.0]):
        scheduled = final(pipe, 9.0)
    assert len(compiled) == 1
    pipe.unet = pipe.unet._orig_mod
    with adapter.guidance_schedule([3.0, 1.0, 2.0]):
        torch.testing.assert_close(final(pipe, 9.0), scheduled, atol=1e-3, rtol=1e-3)


def test_a_copy_is_fused_independently_of_its_original(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe).fuse(2.0)
    two, three = final(pipe, 2.0), final(pipe, 3.0)
    again = copy.deepcopy(pipe)
    adapter.unfuse()
    assert torch.equal(final(again, 3.0), three)
    assert torch.equal(final(again, 2.0), two)
    assert fingerprint(pipe.unet) == fingerprint(build("stable_diffusion").unet)


def test_threads_at_two_scales_share_a_denoiser(pipe: Any, adapter: GuidanceAdapter) -> None:
    other = StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    adapter.attach(pipe).attach(other)
    alone = {2.0: final(pipe, 2.0), 5.0: final(other, 5.0)}
    found: dict[float, list[Tensor]] = {2.0: [], 5.0: []}

    def work(pipe: Any, scale: float) -> None:
        for _ in range(3):
            generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
            options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generators}
            found[scale].append(pipe(PROMPTS, guidance_scale=scale, **options).images)

    threads = [threading.Thread(target=work, args=each) for each in ((pipe, 2.0), (other, 5.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, latents in found.items():
        assert len(latents) == 3
        for each in latents:
            torch.testing.assert_close(each / pipe.vae.config.scaling_factor, alone[scale])


def test_only_a_lora_conditioned_on_the_scale_alone_is_fused(pipe: Any) -> None:
    with pytest.raises(UserError, match="the adapter is not attached: attach it first"):
        everywhere(pipe).fuse(3.0)
    with pytest.raises(UserError, match="cannot be fused: the variant offset computes beside the base's layers"):
        adapter_for(pipe.unet, "offset").attach(pipe).fuse(3.0)
    seeing = build("stable_diffusion")
    config = AdapterConfig("lora", ["attention"], conditions=["timestep"], hidden_size=16, rank=4)
    adapter = GuidanceAdapter.for_denoiser(config, seeing.unet, METADATA).attach(seeing)
    with pytest.raises(UserError, match="cannot be fused: the adapter sees timestep besides the scale"):
        adapter.fuse(3.0)


def test_contexts_of_a_denoiser_guide_before_while_and_after_a_scale_is_fused(
    pipe: Any, adapter: GuidanceAdapter
) -> None:
    inputs = unflatten(inputs_of(pipe, prompt=PROMPTS) | {"return_dict": False})

    @torch.no_grad()
    def at(scale: float | None) -> Tensor:
        if scale is None:
            return pipe.unet(**inputs)[0]
        with adapter.guidance_scale(scale):
            return pipe.unet(**inputs)[0]

    adapter.attach(pipe.unet)
    expected = {scale: at(scale) for scale in (1.0, 3.0, 5.0)}
    adapter.fuse(3.0)
    for scale, found in expected.items():
        torch.testing.assert_close(at(scale), found, **CLOSE)
    torch.testing.assert_close(at(None), expected[3.0], **CLOSE)
    adapter.unfuse()
    for scale, found in expected.items():
        assert torch.equal(at(scale), found)


@pytest.mark.filterwarnings("ignore:the guidance is not fused")
def test_after_a_nested_context_the_outer_one_applies(pipe: Any, adapter: GuidanceAdapter) -> None:
    inputs = unflatten(inputs_of(pipe, prompt=PROMPTS) | {"return_dict": False})
    adapter.attach(pipe)
    with torch.no_grad(), adapter.guidance_scale([2.0, 5.0]):
        outer = pipe.unet(**inputs)[0]
        with adapter.guidance_scale(3.0):
            pass
        assert torch.equal(pipe.unet(**inputs)[0], outer)
    with adapter.guidance_scale(3.0):
        adapter.detach()
    assert fingerprint(pipe.unet) == fingerprint(build("stable_diffusion").unet)


@pytest.mark.parametrize("held", [None, 2.0])
def test_an_interrupted_fuse_leaves_the_weights_unchanged(
    pipe: Any, adapter: GuidanceAdapter, held: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.attach(pipe)
    if held is not None:
        adapter.fuse(held)
    before, count = fingerprint(pipe.unet), []

    def interrupted(weight: Tensor) -> Tensor:
        count.append(1)
        if len(count) == 20:
            raise KeyboardInterrupt
        return weight.detach().flatten()[:64].to(torch.float32, copy=True)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fusing, "start_of", interrupted)
        patch.setattr(fusing.FusedWeights, "check_unchanged", lambda _: None)
        final(pipe, 5.0)
    assert fingerprint(pipe.unet) == before
    adapter.detach()
    assert fingerprint(pipe.unet) == fingerprint(build("stable_diffusion").unet)


def test_a_small_lora_fused_meanwhile_is_noticed_in_half_precision(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    wrapped = copy.deepcopy(pipe.unet)
    wrapped.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    weights = {name: torch.randn_like(value) * 0.005 for name, value in get_peft_model_state_dict(wrapped).items()}
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=weights)
    pipe.to(dtype=torch.bfloat16)
    before = fingerprint(pipe.unet)
    adapter = everywhere(pipe).attach(pipe)
    pipe.load_lora_weights(tmp_path)
    adapter.fuse(3.0)
    pipe.fuse_lora()
    with pytest.raises(UserError, match="undo that change first, or load the pipeline again"):
        adapter.unfuse()
    pipe.unfuse_lora()
    adapter.unfuse()
    pipe.unload_lora_weights()
    assert fingerprint(pipe.unet) == before


def test_the_stock_pipeline_is_saved_while_a_scale_is_fused_too(
    pipe: Any, adapter: GuidanceAdapter, tmp_path: Path
) -> None:
    before = fingerprint(pipe.unet)
    adapter.attach(pipe).fuse(3.0)
    held = fingerprint(pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert fingerprint(StableDiffusionPipeline.from_pretrained(tmp_path).unet) == before
    assert fingerprint(pipe.unet) == held


def test_a_scale_of_one_can_be_fused(pipe: Any, adapter: GuidanceAdapter) -> None:
    plain = final(pipe, 1.0)
    adapter.attach(pipe).fuse(1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    unnamed = pipe(PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="latent").images
    torch.testing.assert_close(unnamed / pipe.vae.config.scaling_factor, plain)


@pytest.mark.filterwarnings("ignore:the guidance is not fused")
def test_hooks_in_half_precision_leave_the_adapter_unchanged(pipe: Any, adapter: GuidanceAdapter) -> None:
    pipe.to(dtype=torch.bfloat16)
    before = fingerprint(adapter)
    adapter.attach(pipe)
    with adapter.guidance_scale([2.0, 3.0]):
        final(pipe)
    final(pipe, 3.0)
    assert fingerprint(adapter) == before
    with adapter.guidance_scale([2.0, 3.0]):
        final(pipe)
    adapter.detach()
    assert fingerprint(adapter) == before


def test_autocast_does_not_affect_the_weights(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe).fuse(3.0)
    exact = fingerprint(pipe.unet)
    with torch.autocast("cpu", torch.bfloat16):
        adapter.fuse(3.0)
    assert fingerprint(pipe.unet) == exact


def test_several_scales_and_fused_projections_are_refused(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    expected = final(pipe, 3.0)
    with pytest.raises(UserError, match=r"guidance_scale=\[2.0, 3.0\]: give one scale, which is fused for all images"):
        adapter.fuse([2.0, 3.0])  # type: ignore[arg-type]
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="runs query, key and value as one layer, .*: call unfuse_qkv_projections"):
        final(pipe, 3.0)
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        adapter.fuse(3.0)
    with pytest.raises(UserError, match="unfuse_qkv_projections"), adapter.guidance_scale(3.0):
        pass
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(final(pipe, 3.0), expected)


def test_copies_in_two_threads_keep_their_scales(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    again = copy.deepcopy(pipe)
    alone = final(again, 2.0)
    started = threading.Event()

    def slow(*_: Any) -> dict[str, Any]:
        started.set()
        time.sleep(0.2)
        return {}

    thread = threading.Thread(target=lambda: final(pipe, 5.0, callback_on_step_end=slow))
    thread.start()
    started.wait()
    try:
        torch.testing.assert_close(final(again, 2.0), alone)
    finally:
        thread.join()
