from __future__ import annotations

import torch

from stages.adapters.conditioning import Conditioning, ScaleEmbedding


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
