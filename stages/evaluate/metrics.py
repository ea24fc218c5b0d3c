"""Metrics, all of them torchmetrics' own, with an exchangeable feature network."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image.fid import FrechetInceptionDistance

from stages.base import first_line, resolve_model
from stages.embedded.classifier import DigitClassifier, Features
from stages.embedded.digits import to_images
from stages.errors import UserError


class Reference:
    """Held-out real images and the classifier that judges beside them.

    Raises:
        UserError: the folder lacks either.
    """

    def __init__(self, folder: str, device: str) -> None:
        root = Path(resolve_model(folder))
        try:
            self.images = to_images(load_file(root / "reference.safetensors")["pixels"]).to(device)
            self.classifier = DigitClassifier.from_pretrained(root / "classifier").eval().to(device)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(
                f"reference={folder}: no reference.safetensors and classifier/ could be read there: {first_line(error)}"
            ) from error

    def measure(self) -> Measure:
        return Measure(self)


class Measure:
    """Frechet distance to the reference (arXiv 1706.08500) and class accuracy of images that come in batches."""

    def __init__(self, reference: Reference) -> None:
        device = reference.images.device
        self.classifier = reference.classifier
        self.distance = FrechetInceptionDistance(Features(self.classifier), normalize=True).to(device)
        self.accuracy = MulticlassAccuracy(self.classifier.config.num_classes, average="micro").to(device)
        with torch.no_grad():
            self.distance.update(reference.images, real=True)

    @torch.no_grad()
    def update(self, images: Tensor, class_labels: list[int]) -> None:
        """Add images `[n, 1, 32, 32]` in [-1, 1] that were asked to be of these classes."""
        self.distance.update(images, real=False)
        self.accuracy.update(self.classifier(images), torch.tensor(class_labels, device=images.device))

    def compute(self) -> dict[str, float]:
        return {"frechet_distance": float(self.distance.compute()), "class_accuracy": float(self.accuracy.compute())}
