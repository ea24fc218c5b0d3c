from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.adapters.layers import CONDITIONING, find_blocks, find_layers, run_trial_of_layers
from stages.base.denoiser import bind_inputs, denoiser_of, latent_name, unflatten
from stages.base.sampling import CALL_DEFAULTS, scale_keyword, undecoded
from stages.errors import UserError
from tests.conftest import tiny_dit
from tests.support.families import ARGUMENTS, FAMILIES, PROMPTS, build


def inputs_of(pipe: Any, **arguments: Any) -> dict[str, Any]:
    """Return the denoiser's flat arguments in the first step of an unguided call."""
    denoiser, seen = denoiser_of(pipe)[1], []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(bind_inputs(denoiser, args, kwargs))

    handle = denoiser.register_forward_pre_hook(look, with_kwargs=True)
    options = {"num_inference_steps": 1, scale_keyword(pipe): 1.0, "output_type": "pt"}
    with undecoded(pipe):
        pipe(**options | CALL_DEFAULTS.get(type(pipe).__name__, {}) | arguments)
    handle.remove()
    return seen[0]


def given_to_layers(denoiser: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Return each linear layer's inputs in one call of the denoiser."""
    given: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.setdefault(name, []).append(args[0].clone()))
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        denoiser(**unflatten(inputs))
    for handle in handles:
        handle.remove()
    return given


def blind_layers(denoiser: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """Find by experiment the linear layers whose inputs ignore the latent and have whole rows per sample."""
    rows, latent = len(inputs[latent_name(denoiser)]), latent_name(denoiser)
    one, other = (given_to_layers(denoiser, inputs | {latent: torch.randn_like(inputs[latent])}) for _ in range(2))
    return {
        name
        for name, tensors in one.items()
        if all(len(a) % rows == 0 and torch.equal(a, b) for a, b in zip(tensors, other[name], strict=True))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_finds_the_same_layers_as_the_experiment(family: str) -> None:
    pipe = build(family)
    inputs = inputs_of(pipe, prompt=[*PROMPTS, PROMPTS[0]], **ARGUMENTS.get(family, {}))
    denoiser = denoiser_of(pipe)[1]
    found = set(find_layers(denoiser, [CONDITIONING], run_trial_of_layers(denoiser, inputs)))
    assert found == blind_layers(denoiser, inputs)
    assert found


def test_in_a_dit_they_are_the_modulation() -> None:
    pipe = tiny_dit()
    seen = run_trial_of_layers(pipe.transformer, inputs_of(pipe, class_labels=[1, 2, 3]))
    found = find_layers(pipe.transformer, [CONDITIONING], seen)
    embedders = {f"norm1.emb.timestep_embedder.linear_{i}" for i in (1, 2)}
    expected = {f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("norm1.linear", *embedders)}
    assert set(found) == expected | {"proj_out_1"}
    assert found["transformer_blocks.0.norm1.linear"] == [16, 96]


def test_the_meta_device_suffices() -> None:
    pipe = tiny_dit()
    inputs = inputs_of(pipe, class_labels=[1, 2, 3])
    with torch.device("meta"):
        empty = type(pipe.transformer).from_config(dict(pipe.transformer.config))
    on_meta = {name: value.to("meta") for name, value in inputs.items() if isinstance(value, Tensor)}
    assert run_trial_of_layers(empty, inputs | on_meta) == run_trial_of_layers(pipe.transformer, inputs)


def test_kinds_and_patterns() -> None:
    unet = build("stable_diffusion").unet
    convolutions = find_layers(unet, ["convolution"])
    assert convolutions["conv_in"] == [4, 8, 3, 3, 1, 1]
    assert convolutions["down_blocks.0.downsamplers.0.conv"] == [8, 8, 3, 3, 2, 1]
    assert set(find_layers(unet, ["attention"])) == {
        name.removesuffix(".weight") for name in unet.state_dict() if ".attn2.to_" in name and name.endswith(".weight")
    }
    every = find_layers(unet, ["*"])
    assert list(every) == [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert set(find_layers(unet, ["*.time_emb_proj"])) == {name for name in every if name.endswith("time_emb_proj")}


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (
            ["*.attn9"],
            r"\*.attn9: no layer in .* pattern of its \d+ linear and convolutional layers, e.g. pos_embed.proj",
        ),
        (["conditioning"], "conditioning: found by running the denoiser, and no inputs are known"),
        ([], "adapter.sites: empty: name some of conditioning, attention"),
    ],
)
def test_a_pattern_without_a_match_is_named(wanted: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        find_layers(tiny_dit().transformer, wanted)


def test_a_denoiser_that_does_not_run_without_data_is_named() -> None:
    transformer = tiny_dit().transformer
    with pytest.raises(UserError, match="DiTTransformer2DModel does not run in a trial, .*: 'NoneType' object"):
        run_trial_of_layers(transformer, {"hidden_states": torch.zeros(3, 4, 8, 8)})


def test_the_depth_of_a_base_is_the_number_of_its_blocks() -> None:
    names = ["transformer_blocks.0.attn1.to_q", "proj_out_1"]
    assert find_blocks(tiny_dit().transformer, names) == {"transformer_blocks": 2}
