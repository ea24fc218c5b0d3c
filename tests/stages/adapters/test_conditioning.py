from __future__ import annotations

import torch

from stages.adapters.conditioning import Conditioning, ScaleEmbedding, find_conditions


def conditioning() -> Conditioning:
    torch.manual_seed(0)
    return Conditioning(16, {"class_labels": {"kind": "label", "classes": 10}}, 1.0)


def test_scale_timestep_and_class_each_matter() -> None:
    known = conditioning()

    def vector(scale: float, timestep: int, label: int) -> torch.Tensor:
        return known(torch.tensor([scale]), torch.tensor([timestep]), {"class_labels": torch.tensor([label])})

    start = vector(2.0, 500, 3)
    assert start.shape == (1, 16)
    for other in (vector(2.5, 500, 3), vector(2.0, 400, 3), vector(2.0, 500, 4)):
        assert not torch.allclose(start, other, atol=1e-3)


def test_the_random_frequencies_are_saved_with_the_weights() -> None:
    assert "scale.frequencies" in conditioning().state_dict()
    assert not torch.equal(ScaleEmbedding(16).frequencies, ScaleEmbedding(16).frequencies)


def test_samples_of_a_batch_do_not_touch() -> None:
    known = conditioning()
    scale, timestep = torch.tensor([2.0, 3.0]), torch.tensor([10, 900])
    labels = torch.tensor([1, 2])
    together = known(scale, timestep, {"class_labels": labels})
    apart = [known(scale[i : i + 1], timestep[i : i + 1], {"class_labels": labels[i : i + 1]}) for i in range(2)]
    torch.testing.assert_close(torch.cat(apart), together)


FLOAT, INT = "float16", "int64"


def told(**shapes: tuple[str, list[int]]) -> dict[str, dict[str, object]]:
    return {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()}


def test_conditions_are_found_by_dtype_and_shape_not_by_name() -> None:
    tokens, pooled = (FLOAT, [77, 64]), (FLOAT, [32])
    assert find_conditions(told(anything=(INT, [])), 7) == {"anything": {"kind": "label", "classes": 7}}
    assert find_conditions(told(words=tokens), 1) == {"words": {"kind": "tokens", "width": 64}}
    assert find_conditions(told(words=tokens, whole=pooled, sizes=(FLOAT, [6])), 1) == {
        "whole": {"kind": "pooled", "width": 32}
    }
    assert find_conditions(told(words=tokens, words_mask=(INT, [77]), mask=(FLOAT, [93])), 1) == {
        "words": {"kind": "tokens", "width": 64}
    }
    assert find_conditions({}, 1) == {}


def test_padding_that_the_mask_tells_changes_nothing() -> None:
    torch.manual_seed(0)
    known = Conditioning(16, {"words": {"kind": "tokens", "width": 32}}, 1.0)
    words, scale, timestep = torch.randn(1, 5, 32), torch.tensor([2.0]), torch.tensor([9])
    short = known(scale, timestep, {"words": words, "words_mask": torch.ones(1, 5)})
    padded = torch.cat([words, 100 * torch.randn(1, 3, 32)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(known(scale, timestep, {"words": padded, "words_mask": mask}), short)
    assert not torch.allclose(known(scale, timestep, {"words": padded}), short, atol=1e-3)


def test_timesteps_count_to_a_thousand_whatever_the_denoiser_counts_to() -> None:
    torch.manual_seed(0)
    counting = Conditioning(16, {}, 1.0)
    torch.manual_seed(0)
    fractions = Conditioning(16, {}, 1e-3)
    scale = torch.tensor([2.0])
    torch.testing.assert_close(fractions(scale, torch.tensor([0.5]), {}), counting(scale, torch.tensor([500]), {}))
