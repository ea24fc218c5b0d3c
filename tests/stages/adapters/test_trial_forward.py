"""A trial forward pass on made-up denoisers with frames in the batch, two streams, lists and unusual layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.conditioning import find_conditions
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.spots import Spot
from stages.adapters.trial_forward import run_trial
from stages.errors import UserError

WIDTH, FRAMES = 16, 3


class MadeUpAttention(nn.Module):
    """Joint attention over an image and a text, in the order of the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv, self.wo = (nn.Linear(WIDTH, width) for width in (WIDTH, 2 * WIDTH, WIDTH))

    def forward(self, first: Tensor, second: Tensor) -> Any:
        both = torch.cat([first, second], 1)
        keys, values = self.wkv(both).chunk(2, -1)
        attended = self.wo(nn.functional.scaled_dot_product_attention(self.wq(both), keys, values))
        return attended.split([first.shape[1], second.shape[1]], 1)


class MadeUpMLP(nn.Module):
    """Three layers, convolutions for pictures."""

    def __init__(self, of_pictures: bool) -> None:
        super().__init__()
        widths = ((WIDTH, 24), (24, 24), (24, WIDTH))
        self.layers = nn.ModuleList(nn.Conv2d(*w, 1) if of_pictures else nn.Linear(*w) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(nn.functional.silu(x))
        return x


class MadeUpBlock(nn.Module):
    def __init__(self, text_first: bool, fold: str) -> None:
        super().__init__()
        self.text_first, self.fold = text_first, fold
        self.attention = MadeUpAttention()
        self.mlp = MadeUpMLP(of_pictures=fold == "pictures")

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        attended = self.attention(text, image)[::-1] if self.text_first else self.attention(image, text)
        return self.folded(image + attended[0]), text + attended[1]

    def folded(self, image: Tensor) -> Tensor:
        if self.fold == "pictures":  # of two columns
            return image + self.mlp(image.mT.unflatten(-1, (-1, 2))).flatten(2).mT
        if self.fold == "none":
            return image + self.mlp(image)
        if self.fold == "tokens first":
            return image + self.mlp(image.transpose(0, 1)).transpose(0, 1)
        frames = image.unflatten(1, (FRAMES, -1))
        if self.fold == "halves":  # neither contiguous nor alternating
            parts = frames.flatten(0, 1)
            order = torch.tensor([0, FRAMES, *range(1, FRAMES), *range(FRAMES + 1, len(parts))])
            return image + self.mlp(parts[order])[order.argsort()].view(image.shape)
        if self.fold == "turns":
            return image + self.mlp(frames.transpose(0, 1).flatten(0, 1)).unflatten(0, (FRAMES, -1)).transpose(
                0, 1
            ).flatten(1, 2)
        return image + self.mlp(frames.flatten(0, 1)).view(image.shape)


class MadeUp(ModelMixin, ConfigMixin):
    """Takes latents `[n, length, 16]`, or a list of them, and texts; its timestep is named `t`."""

    @register_to_config
    def __init__(self, text_first: bool = False, fold: str = "none", looks_at_values: bool = False) -> None:
        super().__init__()
        self.timed = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(MadeUpBlock(text_first, fold) for _ in range(2))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any, t: Tensor, words: Any, return_dict: bool = True) -> tuple[Any]:
        listed = isinstance(x, list)
        image, text = (torch.stack(each) if isinstance(each, list) else each for each in (x, words))
        if self.config.looks_at_values and float(t.sum()) < 0:
            raise ValueError("negative")
        image = image + self.timed(t[:, None] / 1000)[:, None]
        for block in self.blocks:
            image, text = block(image, text)
        return (list(image),) if listed else (image,)


def made_up(**info: Any) -> MadeUp:
    torch.manual_seed(0)
    return MadeUp(**info).eval().requires_grad_(False)


def inputs(listed: bool = False, text: int = 5) -> dict[str, Any]:
    torch.manual_seed(1)
    x, t, words = torch.randn(2, 2 * FRAMES, WIDTH), torch.tensor([700.0, 300.0]), torch.randn(2, text, WIDTH)
    return {"x": list(x), "t": t, "words": list(words)} if listed else {"x": x, "t": t, "words": words}


def metadata() -> AdapterMetadata:
    words = {"words": {"dtype": "float32", "shape": [5, WIDTH]}}
    return AdapterMetadata(conditions=find_conditions(words, 1), scale_range=[1.0, 6.0], timestep="t")


def adapter_for(denoiser: MadeUp, given: dict[str, Any], variant: str) -> GuidanceAdapter:
    """Create an adapter at every site that the trial forward accepts."""
    sites = {"lora": ["*"], "embedding": None}.get(variant, ["attention", "feed_forward"])
    on_meta = {
        name: [v.to("meta") for v in value] if isinstance(value, list) else value.to("meta")
        for name, value in given.items()
    }
    config = AdapterConfig(variant, sites, hidden_size=16, rank=4)
    return GuidanceAdapter.for_denoiser(config, denoiser, metadata(), on_meta)


def predict(denoiser: MadeUp, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return torch.stack(list(denoiser(**given)[0]))


CASES: dict[str, tuple[dict[str, Any], dict[str, Spot]]] = {
    "one row for each": ({}, {}),
    "the text first": ({"text_first": True}, {"attention": Spot(argument=1, output=1)}),
    "frames side by side": ({"fold": "frames"}, {"mlp": Spot()}),
    "frames by turns": ({"fold": "turns"}, {"mlp": Spot(tiled=True)}),
    "tokens first": ({"fold": "tokens first"}, {"mlp": Spot(across=True)}),
    "channels first": ({"fold": "pictures"}, {}),
    "values looked at": ({"looks_at_values": True}, {}),
}


@pytest.mark.parametrize("listed", [False, True], ids=["batch", "list"])
@pytest.mark.parametrize("variant", ["lora", "offset", "cross_attention", "gated_mlp", "embedding", "full"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_changes_the_sample_that_is_guided_and_no_other(case: str, variant: str, listed: bool) -> None:
    info, spots = CASES[case]
    denoiser, given = made_up(**info), inputs(listed)
    before = predict(denoiser, given)
    adapter = adapter_for(denoiser, given, variant).attach(denoiser)
    if variant not in ("lora", "embedding"):
        assert len(adapter.shapes) == 4
        found = {name.rpartition(".")[2]: Spot(**spot) for name, spot in adapter.metadata.spots.items()}
        assert found == {name: spot for name, spot in spots.items() if spot != Spot()}
    with adapter.guidance_scale([1.0, 3.0]):
        assert torch.equal(predict(denoiser, given), before)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    for scales in ([1.0, 3.0], [3.0, 1.0]):
        with adapter.guidance_scale(scales):
            after = predict(denoiser, given)
        for one, other, scale in zip(before, after, scales, strict=True):
            assert torch.equal(one, other) == (scale == 1.0)


@pytest.mark.parametrize("fold", ["frames", "turns"])
@pytest.mark.parametrize("variant", ["lora", "cross_attention", "gated_mlp", "offset"])
def test_frames_in_the_batch_have_the_scale_of_their_sample(variant: str, fold: str) -> None:
    denoiser, given = made_up(fold=fold), inputs()
    adapter = adapter_for(denoiser, given, variant).attach(denoiser)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    with adapter.guidance_scale([2.0, 5.0]):
        together = predict(denoiser, given)
    for i, scale in enumerate([2.0, 5.0]):
        with adapter.guidance_scale(scale):
            alone = predict(denoiser, {name: value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(alone[0], together[i])


def test_other_layouts_are_left_out() -> None:
    denoiser = made_up(fold="halves")
    lora = adapter_for(denoiser, inputs(), "lora")
    assert {name.split(".")[2] for name in lora.shapes if name.startswith("blocks")} == {"attention"}
    offset = adapter_for(denoiser, inputs(), "offset")
    assert list(offset.shapes) == ["blocks.0.attention", "blocks.1.attention"]
    with pytest.raises(UserError, match="feed_forward: no site in MadeUp"):
        GuidanceAdapter.for_denoiser(AdapterConfig("offset", ["feed_forward"]), denoiser, metadata(), inputs())


@pytest.mark.parametrize("looks_at_values", [False, True])
def test_modules_that_run_and_that_see_the_image_are_found_with_and_without_values(looks_at_values: bool) -> None:
    denoiser = made_up(looks_at_values=looks_at_values)
    adapter = GuidanceAdapter.for_denoiser(AdapterConfig("lora", ["conditioning"]), denoiser, metadata(), inputs())
    assert list(adapter.shapes) == ["timed"]
    assert "unused" not in adapter_for(denoiser, inputs(), "lora").shapes


def test_a_trial_forward_leaves_no_hook_and_draws_no_random_number() -> None:
    denoiser, given = made_up(fold="frames"), inputs()
    state = torch.get_rng_state()
    run_trial(denoiser, GuidanceAdapter.get_class("lora").candidates(denoiser), given, metadata())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_prompts_of_different_lengths_in_a_list_take_one_scale() -> None:
    class Ragged(MadeUp):
        def forward(self, x: Any, t: Tensor, words: Any, return_dict: bool = True) -> tuple[Any]:
            return super().forward(x, t, [each[:3] for each in words])

    torch.manual_seed(0)
    denoiser, given = Ragged().eval(), inputs(listed=True)
    given["words"][1] = given["words"][1][:4]
    adapter = adapter_for(denoiser, inputs(listed=True), "lora").attach(denoiser)
    with adapter.guidance_scale(3.0):
        predict(denoiser, given)
    with adapter.guidance_scale([2.0, 3.0]), pytest.raises(UserError, match="give the images one by one"):
        predict(denoiser, given)


@pytest.mark.parametrize("text", [5, 2 * FRAMES], ids=["another length", "the same length"])
@pytest.mark.parametrize("fold", ["none", "frames"], ids=["by gradients", "by values"])
def test_every_block_changes_the_image_stream_of_two(fold: str, text: int) -> None:
    adapter = adapter_for(made_up(text_first=True, fold=fold), inputs(text=text), "offset")
    attention = {name: spot for name, spot in adapter.metadata.spots.items() if name.endswith("attention")}
    assert attention == {f"blocks.{i}.attention": {"argument": 1, "output": 1} for i in range(2)}
