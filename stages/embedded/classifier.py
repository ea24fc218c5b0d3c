"""A small digit classifier: the feature network for the Frechet distance, and the judge of class accuracy."""

from __future__ import annotations

from itertools import pairwise

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class DigitClassifier(ModelMixin, ConfigMixin):
    """Maps images `[n, 1, 32, 32]` in [-1, 1] to class scores; metrics compare sets of images by its `features`.

    It is a diffusers model for `save_pretrained` and `from_pretrained`: safetensors and a config, no pickle.
    """

    @register_to_config
    def __init__(self, num_classes: int = 10, num_features: int = 64) -> None:
        super().__init__()
        channels = [1, 16, 32, 64]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2))
                for inner, outer in pairwise(channels)
            )
        )
        self.project = nn.Linear(64 * 4 * 4, num_features)
        self.head = nn.Linear(num_features, num_classes)
        self.num_features = num_features

    def features(self, images: Tensor) -> Tensor:
        """Features `[n, num_features]`: the input of the last layer, after its non-linearity."""
        return self.project(self.convolutions(images).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores `[n, num_classes]`."""
        return self.head(self.features(images))


class Features(nn.Module):
    """A classifier's features as a feature network for torchmetrics."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)
