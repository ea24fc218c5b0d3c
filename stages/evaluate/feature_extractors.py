"""Feature networks for comparing sets of images, selected by `features=`."""

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
    """Maps images to features and class scores."""

    @property
    def module(self) -> nn.Module:
        """The module that holds the weights."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[n, f]` and class scores `[n, k]` (logits) of images `[n, c, h, w]` in [-1, 1]."""


class ClassifierNetwork:
    """The digit classifier as a feature network."""

    def __init__(self, classifier: DigitClassifier) -> None:
        self.module: DigitClassifier = classifier

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.module.features(images)
        return features, self.module.head(features)


class InceptionNetwork:
    """The InceptionV3 of the published distances, as torch-fidelity ports it from TensorFlow.

    Every image is resized to 299 x 299 by the same antialiased filter, because the choice of filter changes the
    distance more than the choice between many models does (arXiv 2104.11222).

    Args:
        weights: a file of weights; by default torch-fidelity downloads them.

    Raises:
        UserError: torch-fidelity is not installed, or there are no weights.
    """

    def __init__(self, weights: str | None, device: str) -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            raise UserError(
                f"features=inception: torch-fidelity cannot be used: {first_line(error)}: pip install '.[inception]'"
            ) from error
        try:
            extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            found = f"inception_weights={weights}" if weights else "features=inception: its weights"
            raise UserError(
                f"{found}: cannot be loaded: {first_line(error)}: name a file: inception_weights=..."
            ) from error
        self.module: Any = extractor.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        resized = [to_inception(to_picture(image)) for image in images]
        features, scores = self.module(torch.stack(resized).to(images.device))
        return features, scores


def to_inception(picture: Image.Image) -> Tensor:
    """The network's input: the picture's central square, resized, as bytes `[3, 299, 299]`."""
    square = ImageOps.fit(picture.convert("RGB"), (INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load_classifier(folder: Path) -> DigitClassifier | None:
    """Load the classifier for class accuracy from a folder; None if there is no such folder."""
    return DigitClassifier.from_pretrained(folder).eval() if folder.is_dir() else None
