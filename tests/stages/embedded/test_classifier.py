from __future__ import annotations

from pathlib import Path

import torch

from stages.embedded.classifier import DigitClassifier, Features


def test_a_saved_classifier_is_loaded_unchanged(tmp_path: Path) -> None:
    classifier = DigitClassifier(num_features=32).eval()
    classifier.save_pretrained(tmp_path)
    images = torch.randn(3, 1, 32, 32)
    again = DigitClassifier.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images), classifier(images))
    assert Features(again)(images).shape == (3, 32)
    assert Features(again).num_features == 32
