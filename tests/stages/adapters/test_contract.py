"""The contract that every variant fulfils."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.metadata import AdapterMetadata, Base
from stages.adapters.site import expand_to_rows
from stages.base.denoiser import fingerprint
from stages.errors import UserError
from tests.conftest import VARIANTS, small_adapter, tiny_dit

METADATA = AdapterMetadata(
    conditions={"class_labels": {"kind": "label", "classes": 10}},
    scale_range=[1.0, 6.0],
    guidance_gain=1.25,
    prediction_type="epsilon",
    base=Base(pretrained_model_name_or_path="tiny"),
)
LATENT, TIMESTEP, LABELS = torch.randn(4, 4, 8, 8), torch.tensor([900, 500, 100, 3]), torch.tensor([0, 3, 9, 9])
SCALES = [1.0, 2.0, 3.5, 6.0]


def new_adapter(denoiser: Any, variant: str, trained: bool = True) -> GuidanceAdapter:
    torch.manual_seed(1)
    adapter = GuidanceAdapter.for_denoiser(small_adapter(variant), denoiser, METADATA)
    if trained:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return adapter


def predict(denoiser: Any, chosen: Any = slice(None)) -> Tensor:
    with torch.no_grad():
        return denoiser(LATENT[chosen], timestep=TIMESTEP[chosen], class_labels=LABELS[chosen]).sample


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_variant_is_tested() -> None:
    assert sorted(GuidanceAdapter.variants) == sorted(VARIANTS)


def test_untrained_it_leaves_the_output_bit_for_bit_unchanged(variant: str) -> None:
    denoiser = tiny_dit().transformer
    before = predict(denoiser)
    adapter = new_adapter(denoiser, variant, trained=False).attach(denoiser)
    with adapter.guidance_scale(SCALES):
        assert torch.equal(predict(denoiser), before)


def test_trained_it_changes_the_output_until_it_is_detached(variant: str) -> None:
    denoiser = tiny_dit().transformer
    keys, weights, before = list(denoiser.state_dict()), fingerprint(denoiser), predict(denoiser)
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    assert list(denoiser.state_dict()) == keys
    with adapter.guidance_scale(3.0):
        assert not torch.allclose(predict(denoiser), before, atol=1e-3)
    assert torch.equal(predict(denoiser), before)
    adapter.detach()
    assert torch.equal(predict(denoiser), before)
    assert fingerprint(denoiser) == weights
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())


def test_scale_one_is_an_exact_bypass_also_inside_a_batch(variant: str) -> None:
    denoiser = tiny_dit().transformer
    before = predict(denoiser)
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    for scale in (1.0, 0.0):
        with adapter.guidance_scale(scale):
            assert torch.equal(predict(denoiser), before)
    with adapter.guidance_scale(SCALES):
        after = predict(denoiser)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_scales_of_one_batch_equal_single_runs(variant: str) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    with adapter.guidance_scale(SCALES):
        together = predict(denoiser)
    for i, scale in enumerate(SCALES):
        with adapter.guidance_scale(scale):
            torch.testing.assert_close(predict(denoiser, slice(i, i + 1))[0], together[i], atol=2e-5, rtol=1e-4)


def test_one_scale_serves_several_images_of_a_prompt(variant: str) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    with adapter.guidance_scale([2.0, 5.0]):
        together = predict(denoiser)
    with adapter.guidance_scale([2.0, 2.0, 5.0, 5.0]):
        assert torch.equal(predict(denoiser), together)


@pytest.mark.filterwarnings("ignore:guidance_scale 7")
def test_the_gain_raises_scales_but_not_past_the_trained_maximum(variant: str) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    requested, amplified = [1.0, 1.5, 5.0, 7.0], [1.0, 1.75, 6.0, 7.0]
    adapter.metadata = replace(adapter.metadata, guidance_gain=1.0)
    with adapter.guidance_scale(amplified):
        expected = predict(denoiser)
    adapter.metadata = replace(adapter.metadata, guidance_gain=1.5)
    with adapter.guidance_scale(requested):
        assert torch.equal(predict(denoiser), expected)


def test_a_batch_of_another_size_than_the_scales_is_refused(variant: str) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    with (
        pytest.raises(UserError, match="3 guidance scales were given for a batch of 4"),
        adapter.guidance_scale([2, 3, 4]),
    ):
        predict(denoiser)


def test_only_the_adapter_gets_gradients(variant: str) -> None:
    denoiser = tiny_dit().transformer.requires_grad_(False)
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    with adapter.guidance_scale(SCALES):
        denoiser(LATENT, timestep=TIMESTEP, class_labels=LABELS).sample.square().mean().backward()
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_the_conditioning_is_computed_once_per_forward(variant: str) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    calls = []
    adapter.conditioning.register_forward_hook(lambda *_: calls.append(1))
    with adapter.guidance_scale(2.0):
        predict(denoiser)
    assert len(calls) == 1


def test_it_is_loaded_from_its_folder_bit_for_bit(variant: str, tmp_path: Path) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant)
    adapter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = GuidanceAdapter.from_pretrained(tmp_path)
    assert again.config == adapter.config
    assert again.metadata == adapter.metadata
    assert again.shapes == adapter.shapes
    for (name, one), (_, other) in zip(adapter.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    outputs = []
    for one in (adapter, again):
        one.attach(denoiser)
        with one.guidance_scale(SCALES):
            outputs.append(predict(denoiser))
        one.detach()
    assert torch.equal(*outputs)


def test_half_precision_bases_work(variant: str) -> None:
    denoiser = tiny_dit().transformer.to(torch.bfloat16)
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    with adapter.guidance_scale(SCALES), torch.no_grad():
        output = denoiser(LATENT.bfloat16(), timestep=TIMESTEP, class_labels=LABELS).sample
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_scales_outside_the_trained_range_warn_and_name_it(variant: str) -> None:
    adapter = new_adapter(tiny_dit().transformer, variant)
    trained = "the range 1 to 6 that"
    with pytest.warns(UserWarning, match=f"guidance_scale 7.5 is outside {trained}"), adapter.guidance_scale(7.5):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapter.guidance_scale(3.0):
            pass


@pytest.mark.filterwarnings("ignore:guidance_scale")
def test_far_outside_the_trained_range_guidance_stays_what_it_is_at_twice_the_highest(variant: str) -> None:
    denoiser = tiny_dit().transformer
    adapter = new_adapter(denoiser, variant).attach(denoiser)
    adapter.metadata = replace(adapter.metadata, guidance_gain=1.0)

    def predicted(scale: float) -> torch.Tensor:
        with adapter.guidance_scale(scale):
            return predict(denoiser)

    assert not torch.allclose(predicted(1.0), predicted(6.0), atol=1e-4)
    torch.testing.assert_close(predicted(11.0), predicted(100.0))


def test_a_base_of_other_shapes_is_refused_with_its_first_site(variant: str) -> None:
    adapter = new_adapter(tiny_dit().transformer, variant)
    pipe = tiny_dit()
    wider = type(pipe.transformer).from_config({**pipe.transformer.config, "attention_head_dim": 12})
    first = next(iter(adapter.shapes))
    with pytest.raises(UserError, match=rf"at {first} it was made for width 16, the base has width 24"):
        adapter.attach(wider)
    if variant != "embedding":  # without sites it does not depend on the base's depth
        deeper = type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 3})
        with pytest.raises(UserError, match="for 2 transformer_blocks, the base has 3"):
            adapter.attach(deeper)
    adapter.attach(pipe.transformer)
    with pytest.raises(UserError, match="attached already"):
        adapter.attach(pipe.transformer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"{}"),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\xff" * 100),
    ],
    ids=["no json", "no adapter", "empty weights", "no weights"],
)
def test_a_folder_without_an_adapter_is_named(variant: str, tmp_path: Path, name: str, content: bytes) -> None:
    new_adapter(tiny_dit().transformer, variant).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="not an adapter"):
        GuidanceAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(("version", "way_out"), [(2, "train it again"), (4, "upgrade this project")])
def test_another_version_of_the_format_is_refused_with_the_way_out(tmp_path: Path, version: int, way_out: str) -> None:
    new_adapter(tiny_dit().transformer, "offset").save_pretrained(tmp_path)
    info = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(info | {"format_version": version}))
    with pytest.raises(UserError, match=f"has format version {version}, not 3: {way_out}"):
        GuidanceAdapter.from_pretrained(tmp_path)


def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(UserError, match=r"adapter.variant=magic: one of cross_attention, embedding, full"):
        GuidanceAdapter.for_denoiser(AdapterConfig("magic"), tiny_dit().transformer, METADATA)


@pytest.mark.parametrize(("tiled", "rows"), [(False, [1.0, 1.0, 2.0, 2.0]), (True, [1.0, 2.0, 1.0, 2.0])])
def test_a_layer_may_see_several_rows_of_each_sample(tiled: bool, rows: list[float]) -> None:
    assert expand_to_rows(torch.tensor([1.0, 2.0]), 4, tiled).tolist() == rows
    assert expand_to_rows(torch.tensor([[1.0], [2.0]]), 4, tiled).tolist() == [[row] for row in rows]
    with pytest.raises(UserError, match="gets 3 rows for 2 samples"):
        expand_to_rows(torch.tensor([1.0, 2.0]), 3, tiled)
