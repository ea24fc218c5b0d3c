"""The shapes of the real denoisers, without weights, and the pages' tables of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.adapters import AdapterConfig
from stages.adapters.layers import CONDITIONING, find_layers, run_trial_of_layers
from stages.adapters.sites import find_sites
from tests.support.real_shapes import SHAPES, Shape, adapter_for, inputs_of, on_meta, parameters, sizes, table

ATTENTION_SITES = {
    "dit_xl_2_256": 28, "dit_xl_2_512": 28, "sd15": 16, "sd21": 16, "sdxl": 70,
    "sd3": 24, "pixart_sigma": 28, "qwen_image": 60, "chroma": 57, "wan": 30,
}  # fmt: skip
CONDITIONING_LAYERS = {
    "dit_xl_2_256": 85, "dit_xl_2_512": 85, "sd15": 56, "sd21": 56, "sdxl": 161,
    "sd3": 57, "pixart_sigma": 61, "qwen_image": 127, "chroma": 16, "wan": 65,
}  # fmt: skip
LARGEST_SHARES = {
    "offset": 0.02, "lora": 0.02, "embedding": 0.02, "cross_attention": 0.05, "gated_mlp": 0.05,
}  # fmt: skip
MILLIONS = {"sd15": 860, "sd21": 866, "sdxl": 2567, "sd3": 2243, "pixart_sigma": 611}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.config)
def test_every_block_has_its_site(shape: Shape) -> None:
    assert len(find_sites(on_meta(shape.config), ["attention"])) == ATTENTION_SITES[shape.config]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.config)
def test_the_layers_that_do_not_see_the_image_are_found(shape: Shape) -> None:
    denoiser = on_meta(shape.config)
    assert (
        len(find_layers(denoiser, [CONDITIONING], run_trial_of_layers(denoiser, inputs_of(shape, denoiser, 3))))
        == CONDITIONING_LAYERS[shape.config]
    )


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.config in MILLIONS], ids=lambda shape: shape.config)
def test_the_shapes_are_those_of_the_published_weights(shape: Shape) -> None:
    assert round(parameters(on_meta(shape.config)) / 1e6) == MILLIONS[shape.config]


@pytest.mark.parametrize("config", ["dit_xl_2_256", "sd15", "sdxl"])
@pytest.mark.parametrize(("variant", "limit"), LARGEST_SHARES.items())
def test_by_default_an_adapter_is_a_few_percent_of_its_base(config: str, variant: str, limit: float) -> None:
    shape = next(shape for shape in SHAPES if shape.config == config)
    assert 0 < parameters(adapter_for(shape, AdapterConfig(variant))) / parameters(on_meta(config)) <= limit


def test_a_record_is_its_latent_and_its_target_in_half_precision() -> None:
    sizes = {shape.config: shape.record_bytes for shape in SHAPES}
    assert sizes["dit_xl_2_256"] == 16 * 1024
    assert sizes["sdxl"] == 256 * 1024


STAGES = Path(__file__).parents[2] / "stages"


@pytest.mark.long
def test_the_pages_show_these_tables() -> None:
    assert table() in (STAGES / "generate" / "README.md").read_text()
    assert sizes() in (STAGES / "adapters" / "README.md").read_text()
