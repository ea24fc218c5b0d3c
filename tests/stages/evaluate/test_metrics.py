from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.embedded.attributes import attributes, caption
from stages.embedded.classifier import DigitClassifier
from stages.errors import UserError
from stages.evaluate.metrics import Measure, Reference
from stages.sampling import Condition

DIGITS = "stages/embedded/digits"


def classes(labels: list[int]) -> list[Condition]:
    return [{"class_label": label} for label in labels]


def test_captions_are_met_by_the_images_they_were_made_of() -> None:
    reference = Reference(DIGITS, "cpu")
    images = reference.images[::40]
    told = [(0, *pair) for pair in attributes(images).tolist()]
    right, wrong = Measure(reference), Measure(reference)
    right.update(images, [{"class_label": 0, "prompt": caption(*row)} for row in told])
    wrong.update(images, [{"class_label": 0, "prompt": caption(0, (row[1] + 1) % 3, row[2])} for row in told])
    assert (right.compute()["stroke_accuracy"], right.compute()["slant_accuracy"]) == (1, 1)
    assert (wrong.compute()["stroke_accuracy"], wrong.compute()["slant_accuracy"]) == (0, 1)
    other = Measure(reference)
    other.update(images, [{"class_label": 0, "prompt": "a cat"}] * len(images))
    assert "stroke_accuracy" not in other.compute()


def test_the_same_images_have_no_distance_and_their_own_classes() -> None:
    reference = Reference(DIGITS, "cpu")
    measure = Measure(reference)
    labels = reference.classifier(reference.images[:500]).argmax(1).tolist()
    measure.update(reference.images[:500], classes(labels))
    measure.update(reference.images[500:], classes(reference.classifier(reference.images[500:]).argmax(1).tolist()))
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
    measure.update(shifted, classes([0] * len(shifted)))
    assert measure.compute()["frechet_distance"] == pytest.approx(2 * 9 + 2 * (1 + 4 - 2 * 2), rel=0.03)


def test_a_folder_without_a_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference=.*no reference.safetensors"):
        Reference(str(tmp_path), "cpu")
