from __future__ import annotations

import torch

from stages.evaluate.rules import Agreement, Every, FirstSteps, Interval, Place, Rule, agreement


def guided(rule: Rule, steps: int, first: int = 0) -> list[int]:
    """The guided steps of a scheduler with one step per timestep, from a first timestep on."""
    return [i for i in range(first, steps) if rule.guided(Place(i - first, steps, i, steps), 1) == [True]]


def test_rules_guide_at_their_steps() -> None:
    assert guided(FirstSteps(50), 5) == [0, 1, 2]  # rounded up
    assert guided(Interval(20, 80), 5) == [1, 2, 3]
    assert guided(Interval(50, 50), 5) == []
    assert guided(Interval(0, 100), 5) == [0, 1, 2, 3, 4]
    assert guided(Every(3), 8) == [0, 3, 6]
    assert guided(Every(3), 8, first=1) == [1, 4, 7]


def test_an_image_whose_predictions_agreed_is_not_guided_again() -> None:
    rule, place = Agreement(0.9), Place(0, 4, 0, 4)
    assert rule.guided(place, 3) == [True, True, True]
    latents = torch.tensor([[0.0, 0.0, 1.0]] * 3)
    one = torch.tensor([[1.0, 0.0, 5.0]] * 3)
    other = torch.tensor([[1.0, 0.1, 5.0], [1.0, 1.0, 5.0], [1.0, 0.0, -9.0]])
    rule.see(latents, one, other, [0, 1, 2])
    assert rule.guided(place, 3) == [False, True, False]
    rule.see(latents[:1], one[:1], one[:1], [1])
    assert rule.guided(place, 3) == [False, False, False]


def test_agreement_does_not_depend_on_what_a_model_predicts() -> None:
    """Noise, velocity and image of the same latents are equally alike; the noise alone seems alike at high noise."""
    torch.manual_seed(0)
    clean, other, noise = torch.randn(3, 4, 16, 16)
    alpha, sigma = 0.1, 0.995
    latents = alpha * clean + sigma * noise
    predicted = {
        "sample": [clean, other],
        "epsilon": [(latents - alpha * x0) / sigma for x0 in (clean, other)],
        "velocity": [(alpha * latents - x0) / sigma for x0 in (clean, other)],
    }
    found = {kind: agreement(latents, *pair) for kind, pair in predicted.items()}
    for alike in found.values():
        torch.testing.assert_close(alike, found["sample"], atol=1e-3, rtol=0)
    assert float(found["sample"].abs().max()) < 0.2
    raw = torch.cosine_similarity(*(each.flatten(1) for each in predicted["epsilon"]), dim=1)
    assert float(raw.min()) > 0.95
