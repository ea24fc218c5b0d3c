"""Metrics, all of them torchmetrics' own, with an exchangeable feature network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image.fid import FrechetInceptionDistance

from stages.base import first_line, resolve
from stages.embedded.attributes import attributes, read_caption
from stages.embedded.classifier import DigitClassifier, Features
from stages.embedded.digits import to_images
from stages.errors import UserError
from stages.sampling import Condition


class Reference:
    """Held-out real images and the classifier that judges beside them.

    Raises:
        UserError: the folder lacks either.
    """

    def __init__(self, folder: str, device: str) -> None:
        root = Path(resolve(folder))
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
    """Frechet distance to the reference (arXiv 1706.08500) and class accuracy of images that come in batches.

    Where the prompts are captions of measured attributes (`stages.embedded.attributes`), also how often those are met.
    """

    def __init__(self, reference: Reference) -> None:
        device = reference.images.device
        self.classifier = reference.classifier
        self.distance = FrechetInceptionDistance(Features(self.classifier), normalize=True).to(device)
        self.accuracy = MulticlassAccuracy(self.classifier.config.num_classes, average="micro").to(device)
        self.met: list[Tensor] = []
        with torch.no_grad():
            self.distance.update(reference.images, real=True)

    @torch.no_grad()
    def update(self, images: Tensor, conditions: Sequence[Condition]) -> None:
        """Add images `[n, 1, 32, 32]` in [-1, 1] that were asked to be of these classes, or of these captions."""
        self.distance.update(images, real=False)
        labels = torch.tensor([condition["class_label"] for condition in conditions], device=images.device)
        self.accuracy.update(self.classifier(images), labels)
        asked = [read_caption(condition.get("prompt", "")) for condition in conditions]
        if all(caption is not None for caption in asked):
            met = attributes(images).cpu() == torch.tensor([caption[1:] for caption in asked if caption])
            self.met.append(met.float())

    def compute(self) -> dict[str, float]:
        shares = torch.cat(self.met).mean(0).tolist() if self.met else []
        return {
            "frechet_distance": float(self.distance.compute()),
            "class_accuracy": float(self.accuracy.compute()),
            **dict(zip(("stroke_accuracy", "slant_accuracy"), shares, strict=False)),
        }
