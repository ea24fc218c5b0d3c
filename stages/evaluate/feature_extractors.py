"""Feature networks: what sets of images are compared by. Exchangeable, and told by name with `features=`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from stages.base.loading import first_line
from stages.base.pictures import to_picture
from stages.embedded.classifier import DigitClassifier
from stages.errors import UserError

CLASSIFIER, INCEPTION = "classifier", "inception"
NETWORKS = (CLASSIFIER, INCEPTION)
INCEPTION_SIZE = 299


class FeatureNetwork(Protocol):
    """Images to what they are compared by."""

    @property
    def module(self) -> nn.Module:
        """What its weights are in."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[n, f]` and class scores `[n, k]` (logits) of images `[n, c, h, w]` in [-1, 1]."""


class ClassifierNetwork:
    """The digits' own classifier."""

    def __init__(self, classifier: DigitClassifier) -> None:
        self.module: DigitClassifier = classifier

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.module.features(images)
        return features, self.module.head(features)


class InceptionNetwork:
    """The InceptionV3 of the published distances, as torch-fidelity ports it from TensorFlow.

    Every image is brought to 299 x 299 by the same antialiased filter, because how images are resized moves the
    distance more than many models differ (arXiv 2104.11222).

    Args:
        weights: a file; by default torch-fidelity downloads its own.

    Raises:
        UserError: torch-fidelity is not installed, or there are no weights.
    """

    def __init__(self, weights: str | None, device: str) -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision made for another torch ends in a RuntimeError
            raise UserError(
                f"features=inception: torch-fidelity cannot be used: {first_line(error)}: pip install '.[inception]'"
            ) from error
        try:
            extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            found = f"inception_weights={weights}" if weights else "features=inception: its weights"
            raise UserError(
                f"{found}: not to be had: {first_line(error)}: name a file: inception_weights=..."
            ) from error
        self.module: Any = extractor.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        resized = [to_inception(to_picture(image)) for image in images]
        features, scores = self.module(torch.stack(resized).to(images.device))
        return features, scores


def to_inception(picture: Image.Image) -> Tensor:
    """A picture as the network takes it: bytes `[3, 299, 299]`, the middle square of it, resized."""
    square = ImageOps.fit(picture.convert("RGB"), (INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load_classifier(folder: Path) -> DigitClassifier | None:
    """The judge of class accuracy that stands beside reference images, where there is one."""
    return DigitClassifier.from_pretrained(folder).eval() if folder.is_dir() else None
