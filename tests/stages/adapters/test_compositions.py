"""An attached adapter together with other extensions of a pipeline."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.metadata import AdapterMetadata, Base
from stages.base.hooks import count_evaluations
from stages.base.sampling import undecoded
from tests.conftest import VARIANTS, mostly_long
from tests.support.families import NO_CHECKER, PROMPTS, WIDTH, build, enliven

METADATA = AdapterMetadata(
    conditions={"encoder_hidden_states": {"kind": "tokens", "width": WIDTH}},
    scale_range=[1.0, 8.0],
    base=Base(denoiser_subfolder="unet"),
)
STEPS = 3


def adapter_for(
    denoiser: Any, variant: str = "lora", std: float = 0.1, metadata: AdapterMetadata = METADATA
) -> GuidanceAdapter:
    """Create an adapter with random weights, as if it were trained."""
    torch.manual_seed(1)
    sites = ["attention", "feed_forward"] if variant == "lora" else None
    adapter = GuidanceAdapter.for_denoiser(AdapterConfig(variant, sites, hidden_size=16, rank=4), denoiser, metadata)
    for parameter in adapter.sites.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return adapter


def final(pipe: Any, scale: float = 3.0, **arguments: Any) -> Tensor:
    """Return the final latents of both prompts, each from its own noise."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"num_inference_steps": STEPS, "output_type": "pt"} | arguments
    with undecoded(pipe) as latents:
        pipe(PROMPTS, guidance_scale=scale, generator=generators, **options)
    return latents[0]


def unlike(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, atol=1e-2, rtol=1e-2)


@pytest.fixture
def pipe() -> Any:
    return build("stable_diffusion")


@pytest.fixture
def adapter(pipe: Any) -> GuidanceAdapter:
    return adapter_for(pipe.unet)


@pytest.fixture
def picture() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture
def lora(pipe: Any, tmp_path: Path) -> Path:
    """The folder of a user's LoRA."""
    torch.manual_seed(2)
    other = copy.deepcopy(pipe.unet)
    other.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]))
    weights = get_peft_model_state_dict(other)
    weights = {name: torch.randn_like(value) * 0.3 for name, value in weights.items()}
    StableDiffusionPipeline.save_lora_weights(str(tmp_path / "lora"), unet_lora_layers=weights)
    return tmp_path / "lora"


@pytest.mark.parametrize("variant", ["gated_mlp", "lora", "full"])
def test_a_lora_can_be_loaded_before_or_after_and_unloaded(pipe: Any, lora: Path, variant: str) -> None:
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    alone = final(pipe)
    pipe.load_lora_weights(lora)
    after = final(pipe)
    adapter.detach()
    only_lora = final(pipe, 1.0)
    adapter.attach(pipe)
    before = final(pipe)
    assert torch.equal(before, after)
    assert unlike(before, alone)
    assert unlike(before, only_lora)
    pipe.unload_lora_weights()
    assert torch.equal(final(pipe), alone)


def test_controlnet(pipe: Any, adapter: GuidanceAdapter, picture: list[Image.Image]) -> None:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 16))
    enliven(controlnet)
    steered = StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet, requires_safety_checker=False)
    steered.set_progress_bar_config(disable=True)
    adapter.attach(steered)
    with count_evaluations(pipe.unet) as count:
        one = final(steered, image=picture)
    assert count[0] == STEPS * len(PROMPTS)
    assert unlike(one, final(steered, image=picture, controlnet_conditioning_scale=0.0))
    assert unlike(one, final(steered, 1.0, image=picture))


def test_ip_adapter(pipe: Any, adapter: GuidanceAdapter, picture: list[Image.Image]) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(vision).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    components = pipe.components | NO_CHECKER | {"feature_extractor": processor, "image_encoder": encoder}
    seen: Any = StableDiffusionPipeline(**components)
    seen.set_progress_bar_config(disable=True)
    adapter.attach(seen)
    seen.unet._load_ip_adapter_weights([ip_adapter_weights(seen.unet)])
    seen.set_ip_adapter_scale(1.0)
    with count_evaluations(seen.unet) as count:
        one = final(seen, ip_adapter_image=[picture])
    assert count[0] == STEPS * len(PROMPTS)
    assert unlike(one, final(seen, 1.0, ip_adapter_image=[picture]))
    seen.set_ip_adapter_scale(0.0)
    assert unlike(one, final(seen, ip_adapter_image=[picture]))


def ip_adapter_weights(unet: Any) -> dict[str, Any]:
    """Return the contents of an IP-Adapter file for this UNet."""
    layers, i = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            processor = IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=WIDTH, num_tokens=(4,))
            layers[f"{i}.to_k_ip.weight"] = torch.randn_like(processor.to_k_ip[0].weight)
            layers[f"{i}.to_v_ip.weight"] = torch.randn_like(processor.to_v_ip[0].weight)
            i += 2
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, WIDTH),
        "proj.bias": torch.randn(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def test_image_to_image_and_inpainting_share_the_denoiser(
    pipe: Any, adapter: GuidanceAdapter, picture: list[Image.Image]
) -> None:
    adapter.attach(pipe)
    text_to_image = final(pipe)
    to_image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    inpainting = StableDiffusionInpaintPipeline.from_pipe(pipe)
    assert type(to_image) is StableDiffusionImg2ImgPipeline
    mask = Image.fromarray(np.pad(np.full((16, 32), 255, np.uint8), ((0, 16), (0, 0))))
    for other, given in ((to_image, {}), (inpainting, {"mask_image": [mask, mask], "height": 32, "width": 32})):
        other.set_progress_bar_config(disable=True)
        adapter.attach(other)
        with count_evaluations(pipe.unet) as count:
            one = final(other, image=picture, strength=0.7, num_inference_steps=6, **given)
        assert count[0] == 4 * len(PROMPTS)
        assert unlike(one, final(other, 1.0, image=picture, strength=0.7, num_inference_steps=6, **given))
    adapter.detach()
    assert type(pipe) is StableDiffusionPipeline
    assert type(inpainting) is StableDiffusionInpaintPipeline
    adapter.attach(pipe)
    assert torch.equal(final(pipe), text_to_image)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload_with_hook, accelerate.cpu_offload])
def test_offloading(pipe: Any, adapter: GuidanceAdapter, offload: Any) -> None:
    """Offload as `enable_model_cpu_offload` and `enable_sequential_cpu_offload` do, which both refuse a CPU."""
    adapter.attach(pipe)
    before = final(pipe)
    offload(pipe.unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(final(pipe), before, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_offloading_on_a_gpu(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    before = final(pipe)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(final(pipe).cpu(), before, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_the_base_does(pipe: Any, variant: str, dtype: torch.dtype) -> None:
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    guided, plain = final(pipe), final(pipe, 1.0)
    adapter.detach()
    pipe.to(dtype=dtype)
    adapter.attach(pipe)
    half = final(pipe)
    assert adapter.dtype == (torch.float32 if adapter.fused else dtype)
    assert half.dtype == dtype
    assert (half.float() - guided).norm() < 2 * (final(pipe, 1.0).float() - plain).norm()


@pytest.mark.parametrize("variant", mostly_long(VARIANTS, ["offset", "lora"]))
def test_compiled_without_a_graph_break(pipe: Any, variant: str) -> None:
    torch.compiler.reset()
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    guided, plain = final(pipe), final(pipe, 1.0)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(final(pipe), guided)
    torch.testing.assert_close(final(pipe, 1.0), plain)
    adapter.detach()
    torch.testing.assert_close(final(pipe, 1.0), plain)


def test_a_negative_prompt_that_was_not_trained_on_warns_once(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.attach(pipe)
    without = final(pipe)
    with pytest.warns(UserWarning, match=r"negative_prompt \(blurry\) does nothing: .* not trained to see negative"):
        assert torch.equal(final(pipe, negative_prompt=["blurry", ""]), without)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        final(pipe, negative_prompt="grey")


def test_the_negative_prompt_of_the_training_does_not_warn(pipe: Any, adapter: GuidanceAdapter) -> None:
    adapter.metadata = replace(adapter.metadata, arguments={"negative_prompt": "blurry"})
    adapter.attach(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        final(pipe, negative_prompt="blurry")


@pytest.mark.parametrize("length", [77, 512])
def test_prompts_may_be_longer_than_in_training(pipe: Any, length: int) -> None:
    adapter = adapter_for(pipe.unet, "cross_attention").attach(pipe)
    embeds = torch.randn(2, length, WIDTH)
    with count_evaluations(pipe.unet) as count, undecoded(pipe) as latents:
        pipe(prompt_embeds=embeds, guidance_scale=3.0, num_inference_steps=STEPS, output_type="pt")
    assert count[0] == STEPS * len(embeds)
    assert latents[0].isfinite().all()
    adapter.detach()


def test_attached_to_a_compiled_denoiser(pipe: Any, adapter: GuidanceAdapter) -> None:
    torch.compiler.reset()
    adapter.attach(pipe)
    guided = final(pipe)
    adapter.detach()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    plain = final(pipe, 1.0)
    adapter.attach(pipe)
    torch.testing.assert_close(final(pipe), guided)
    assert unlike(guided, plain)


def test_a_denoiser_quantised_by_torchao(pipe: Any, adapter: GuidanceAdapter) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    adapter.attach(pipe)
    exact = final(pipe)
    adapter.detach()
    quantization.quantize_(pipe.unet, quantization.Int8WeightOnlyConfig())
    adapter.attach(pipe)
    with pytest.warns(UserWarning, match="the guidance is not fused, so each pass costs more: .* is quantised"):
        quantised = final(pipe)
    assert adapter.fused is False
    plain = final(pipe, 1.0)
    assert (quantised - exact).norm() < 0.25 * (exact - plain).norm()


def test_a_denoiser_quantised_by_bitsandbytes(pipe: Any, adapter: GuidanceAdapter) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    adapter.attach(pipe)
    exact = final(pipe)
    adapter.detach()
    name = next(name for name in adapter.shapes if type(pipe.unet.get_submodule(name)) is nn.Linear)
    layer = pipe.unet.get_submodule(name)
    quantised = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    quantised.load_state_dict(layer.state_dict())
    pipe.unet.set_submodule(name, quantised)
    adapter.attach(pipe)
    with pytest.warns(UserWarning, match="the guidance is not fused, so each pass costs more: .* is quantised"):
        found = final(pipe)
    assert adapter.fused is False
    assert (found - exact).norm() < 0.25 * (exact - final(pipe, 1.0)).norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deep_copy_is_guided_by_the_same_adapter(pipe: Any, variant: str) -> None:
    adapter = adapter_for(pipe.unet, variant).attach(pipe)
    guided = final(pipe)
    again = copy.deepcopy(pipe)
    assert again.unet is not pipe.unet
    assert torch.equal(final(again), guided)
    adapter.detach()
    assert unlike(final(pipe, 1.0), guided)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_attached_pipeline_is_saved_as_the_stock_one(pipe: Any, variant: str, tmp_path: Path) -> None:
    plain = final(pipe, 1.0)
    adapter_for(pipe.unet, variant).attach(pipe)
    final(pipe)
    pipe.save_pretrained(tmp_path)
    again: Any = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusionPipeline
    assert torch.equal(final(again, 1.0), plain)
