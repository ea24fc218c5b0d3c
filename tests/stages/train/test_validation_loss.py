from __future__ import annotations

import torch

from stages.train.validation_loss import guidance_gain


def test_the_gain_makes_a_regression_as_large_as_its_target() -> None:
    torch.manual_seed(0)
    seen, unseen = torch.randn(2, 100_000)
    guidance = seen + 0.5 * unseen  # of which a regression on what is seen predicts the first part
    gain = guidance_gain((guidance - seen).square().mean().item(), guidance.square().mean().item())
    assert abs((gain * seen).square().mean() / guidance.square().mean() - 1) < 0.01
    assert abs(gain - 1.25**0.5) < 0.01


def test_full_or_little_explanation_gives_no_gain() -> None:
    assert guidance_gain(0.0, 1.0) == guidance_gain(0.6, 1.0) == guidance_gain(2.0, 1.0) == 1.0
    assert guidance_gain(0.0, 0.0) == 1.0  # records without guidance
