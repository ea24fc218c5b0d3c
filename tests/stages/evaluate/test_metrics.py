from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.embedded.classifier import DigitClassifier
from stages.errors import UserError
from stages.evaluate.metrics import Measure, Reference

DIGITS = "stages/embedded/digits"


def test_the_same_images_have_no_distance_and_their_own_classes() -> None:
    reference = Reference(DIGITS, "cpu")
    measure = Measure(reference)
    labels = reference.classifier(reference.images[:500]).argmax(1).tolist()
    measure.update(reference.images[:500], labels)
    measure.update(reference.images[500:], reference.classifier(reference.images[500:]).argmax(1).tolist())
    found = measure.compute()
    assert abs(found["frechet_distance"]) < 0.01
    assert found["class_accuracy"] == 1


def test_the_distance_of_two_gaussians_is_the_known_one() -> None:
    """|m|^2 + trace(A + B - 2 sqrt(AB)) for features N(0, 1) and N(m, s^2) in each of two dimensions."""

    class Identity(DigitClassifier):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :2]

    torch.manual_seed(0)
    reference = object.__new__(Reference)
    reference.classifier = Identity(num_features=2)
    reference.images = torch.randn(20_000, 1, 32, 32)
    measure = Measure(reference)
    shifted = 2 * torch.randn(20_000, 1, 32, 32) + 3
    measure.update(shifted, [0] * len(shifted))
    assert measure.compute()["frechet_distance"] == pytest.approx(2 * 9 + 2 * (1 + 4 - 2 * 2), rel=0.03)


def test_a_folder_without_a_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference=.*no reference.safetensors"):
        Reference(str(tmp_path), "cpu")
