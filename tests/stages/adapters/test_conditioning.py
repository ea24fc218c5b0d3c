from __future__ import annotations

import pytest
import torch

from stages.adapters.conditioning import (
    Conditioning,
    Conditions,
    ScaleAlone,
    ScaleEmbedding,
    choose_conditions,
    find_conditions,
    mask_of,
    scale_curves,
)
from stages.errors import UserError


def conditioning() -> Conditioning:
    torch.manual_seed(0)
    return Conditioning(16, {"class_labels": {"kind": "label", "classes": 10}}, 1.0)


def conditions_for(
    conditioner: Conditioning, scale: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> Conditions:
    return conditioner(scale, timestep, conditioner.embed(inputs))


def test_scale_timestep_and_class_each_matter() -> None:
    conditioner = conditioning()

    def vector(scale: float, timestep: int, label: int) -> torch.Tensor:
        labels = {"class_labels": torch.tensor([label])}
        return conditions_for(conditioner, torch.tensor([scale]), torch.tensor([timestep]), labels).vector

    start = vector(2.0, 500, 3)
    assert start.shape == (1, 16)
    for other in (vector(2.5, 500, 3), vector(2.0, 400, 3), vector(2.0, 500, 4)):
        assert not torch.allclose(start, other, atol=1e-3)


def test_the_random_frequencies_are_saved_with_the_weights() -> None:
    assert "scale.frequencies" in conditioning().state_dict()
    assert not torch.equal(ScaleEmbedding(16).frequencies, ScaleEmbedding(16).frequencies)


def test_the_curves_of_a_scale_are_0_at_no_guidance_and_rise_from_there() -> None:
    curves = scale_curves(torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(curves[:2], torch.tensor([[0, 0, 0], [1, 0.6931, 0.5]]), atol=1e-4, rtol=0)
    assert (curves.diff(dim=0) > 0).all()


def test_beyond_the_trained_scales_the_curves_are_straight_and_end() -> None:
    inside, beyond = torch.tensor([1.0, 2.0, 3.9]), torch.tensor([4.0, 5.0, 6.0, 7.0])
    assert torch.equal(scale_curves(inside, most=4.0), scale_curves(inside))
    steps = scale_curves(beyond, most=4.0).diff(dim=0)
    torch.testing.assert_close(steps, torch.tensor([[1, 1 / 4, 1 / 16]]).expand(3, 3), atol=1e-5, rtol=0)
    at_end, further = scale_curves(torch.tensor([7.0, 50.0]), most=4.0)  # twice the guidance of scale 4
    assert torch.equal(at_end, further)


def test_scales_beyond_the_trained_ones_are_embedded_as_the_highest() -> None:
    torch.manual_seed(0)
    conditioner = Conditioning(16, {}, 1.0, most=4.0)
    parts = conditions_for(conditioner, torch.tensor([3.0, 4.0, 9.0]), torch.tensor([9, 9, 9]), {}).parts
    torch.testing.assert_close(parts[1], parts[2])
    assert not torch.allclose(parts[0], parts[1], atol=1e-3)


def test_the_scale_alone_is_embedded_without_a_parameter() -> None:
    scale, timestep = torch.tensor([1.5, 3.0]), torch.tensor([9, 9])
    alone = ScaleAlone()
    assert not alone.state_dict()
    assert torch.equal(conditions_for(alone, scale, timestep, {}).curves, scale_curves(scale))
    labels = {"class_labels": torch.tensor([3, 4])}
    assert torch.equal(conditions_for(conditioning(), scale, timestep, labels).curves, scale_curves(scale))


def test_each_condition_is_a_separate_part() -> None:
    labels = {"class_labels": torch.tensor([3])}
    conditions = conditions_for(conditioning(), torch.tensor([2.0]), torch.tensor([9]), labels)
    assert conditions.parts.shape == (1, 3, 16)
    torch.testing.assert_close(conditions.vector, torch.nn.functional.silu(conditions.parts.sum(1)))
    blind = Conditioning(16, {}, 1.0, sees_timestep=False)
    one, other = (conditions_for(blind, torch.tensor([2.0]), torch.tensor([t]), {}) for t in (9, 900))
    assert one.parts.shape == (1, 1, 16)
    assert torch.equal(one.vector, other.vector)


def test_samples_of_a_batch_are_independent() -> None:
    conditioner = conditioning()
    scale, timestep = torch.tensor([2.0, 3.0]), torch.tensor([10, 900])
    labels = torch.tensor([1, 2])
    together = conditions_for(conditioner, scale, timestep, {"class_labels": labels}).vector
    separate = [
        conditions_for(conditioner, scale[i : i + 1], timestep[i : i + 1], {"class_labels": labels[i : i + 1]}).vector
        for i in range(2)
    ]
    torch.testing.assert_close(torch.cat(separate), together)


FLOAT, INT = "float16", "int64"


def info(**shapes: tuple[str, list[int]]) -> dict[str, dict[str, object]]:
    return {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()}


WORDS, WHOLE = {"kind": "tokens", "width": 64}, {"kind": "pooled", "width": 32}


def test_conditions_are_found_by_dtype_and_shape_not_by_name() -> None:
    tokens, pooled = (FLOAT, [77, 64]), (FLOAT, [32])
    assert find_conditions(info(anything=(INT, [])), 7) == {"anything": {"kind": "label", "classes": 7}}
    assert find_conditions(info(words=tokens), 1) == {"words": WORDS}
    assert find_conditions(info(words=tokens, whole=pooled, sizes=(FLOAT, [6])), 1) == {
        "whole": WHOLE,
        "words": WORDS,
    }
    assert find_conditions(info(words=tokens, words_mask=(INT, [77]), mask=(FLOAT, [93])), 1) == {"words": WORDS}
    assert find_conditions({}, 1) == {}
    assert find_conditions(info(lengths=(INT, []), layers=(FLOAT, [4, 77, 64])), 1) == {"layers": WORDS}
    assert find_conditions(info(words=tokens, layers=(FLOAT, [4, 77, 128])), 1) == {"words": WORDS}
    assert find_conditions(info(words=tokens, axes=(FLOAT, [3, 4096])), 1) == {"words": WORDS}
    assert find_conditions(info(one=(FLOAT, [1, 64])), 1) == {"one": WORDS}
    negative = find_conditions(info(words=tokens) | {"negative.words": {"dtype": FLOAT, "shape": [77, 64]}}, 1)
    assert negative == {"words": WORDS, "negative.words": WORDS | {"kind": "negative_tokens"}}


def test_an_adapter_sees_the_chosen_conditions() -> None:
    label = {"anything": {"kind": "label", "classes": 7}}
    both = {"whole": WHOLE, "words": WORDS}
    assert choose_conditions(label, ["timestep", "pooled", "tokens"]) == label
    assert choose_conditions(both, ["timestep", "pooled"]) == {"whole": WHOLE}
    assert choose_conditions(both, ["tokens"]) == {"words": WORDS}
    assert choose_conditions(both, ["pooled", "tokens"]) == both
    assert choose_conditions(both, ["timestep"]) == {}
    assert choose_conditions({"words": WORDS}, ["pooled"]) == {"words": WORDS | {"kind": "mean"}}
    assert choose_conditions({"words": WORDS}, ["pooled", "tokens"]) == {"words": WORDS}
    with pytest.raises(UserError, match="unknown colour: any of timestep, pooled, tokens, negative_tokens"):
        choose_conditions(both, ["colour"])
    with pytest.raises(UserError, match="negative_tokens: the records hold none"):
        choose_conditions(both, ["negative_tokens"])


def test_a_missing_condition_is_named() -> None:
    with pytest.raises(UserError, match="trained with class_labels, and this call of the denoiser has none"):
        conditioning().embed({})


@pytest.mark.parametrize("kind", ["mean", "tokens"])
def test_masked_padding_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    conditioner = Conditioning(16, {"words": {"kind": kind, "width": 32}}, 1.0)
    words, scale, timestep = torch.randn(1, 5, 32), torch.tensor([2.0]), torch.tensor([9])
    short = conditions_for(conditioner, scale, timestep, {"words": words, "words_mask": torch.ones(1, 5)})
    padded = torch.cat([words, 100 * torch.randn(1, 3, 32)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    longer = conditions_for(conditioner, scale, timestep, {"words": padded, "words_mask": mask})
    torch.testing.assert_close(longer.vector, short.vector)
    assert not torch.allclose(
        conditions_for(conditioner, scale, timestep, {"words": padded}).vector, short.vector, atol=1e-3
    )
    if kind == "tokens":
        assert longer.tokens is not None
        assert longer.tokens.shape == (1, 8, 16)
        assert torch.equal(longer.mask, mask.bool())


def test_positive_and_negative_tokens_are_concatenated_with_their_masks() -> None:
    words = {"kind": "tokens", "width": 32}
    conditioner = Conditioning(16, {"words": words, "negative.words": words | {"kind": "negative_tokens"}}, 1.0)
    inputs = {"words": torch.randn(1, 3, 32), "negative.words": torch.randn(1, 2, 32)}
    seen = conditions_for(conditioner, torch.tensor([2.0]), torch.tensor([9]), inputs)
    assert seen.tokens is not None
    assert (seen.tokens.shape, seen.mask) == ((1, 5, 16), None)
    masked = conditions_for(
        conditioner, torch.tensor([2.0]), torch.tensor([9]), inputs | {"negative.words_mask": torch.tensor([[1, 0]])}
    )
    assert masked.mask.tolist() == [[True, True, True, True, False]]


def test_timesteps_are_scaled_to_a_thousand() -> None:
    torch.manual_seed(0)
    counting = Conditioning(16, {}, 1.0)
    torch.manual_seed(0)
    fractions = Conditioning(16, {}, 1e-3)
    scale = torch.tensor([2.0])
    one = conditions_for(fractions, scale, torch.tensor([0.5]), {}).vector
    torch.testing.assert_close(one, conditions_for(counting, scale, torch.tensor([500]), {}).vector)


def test_masks_are_recognized_by_their_shape() -> None:
    inputs = {
        "clip": torch.randn(2, 5, 32),
        "clip_counts": torch.tensor([[1, 1, 1, 0, 0]] * 2),
        "t5": torch.randn(2, 5, 32),
        "t5_counts": torch.tensor([[True] * 4 + [False]] * 2),
        "others": torch.randn(2, 7, 32),
        "pooled": torch.randn(2, 7),
        "negative.clip": torch.randn(2, 5, 32),
    }
    assert mask_of("clip", inputs) is inputs["clip_counts"]
    assert mask_of("t5", inputs) is inputs["t5_counts"]
    assert mask_of("others", inputs) is None
    assert mask_of("negative.clip", inputs) is None


def test_several_embeddings_of_a_token_become_several_tokens() -> None:
    torch.manual_seed(0)
    conditioner = Conditioning(16, {"layers": {"kind": "tokens", "width": 32}}, 1.0)
    layers, counts = torch.randn(1, 3, 2, 32), torch.tensor([[1, 1, 0]])
    seen = conditions_for(conditioner, torch.tensor([2.0]), torch.tensor([9]), {"layers": layers, "counts": counts})
    assert seen.tokens is not None
    assert seen.tokens.shape == (1, 6, 16)
    assert seen.mask.tolist() == [[True, True, True, True, False, False]]
