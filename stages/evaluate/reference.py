"""Real images to compare with: the embedded digits, or any folder of image files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor

from stages.base.denoiser import fingerprint
from stages.base.loading import first_line, resolve
from stages.embedded.digits import to_images
from stages.errors import UserError
from stages.evaluate.feature_extractors import (
    CLASSIFIER,
    ClassifierNetwork,
    FeatureNetwork,
    InceptionNetwork,
    load_classifier,
    to_inception,
)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
BATCH = 100
NAMED_FILES = 3


class Reference:
    """Held-out real images, a feature network to compare them by, and optionally a classifier.

    Args:
        folder: a folder with `reference.safetensors` (`pixels`, bytes `[m, 28, 28]`) or image files (png, jpg, webp),
            and optionally `classifier/`.
        features: name of the feature network.
        weights: file of InceptionV3's weights.

    Attributes:
        images: `[m, 1, 32, 32]` in [-1, 1], or the image files' paths.
        classifier: the classifier for class accuracy, or None.

    Raises:
        UserError: the folder lacks images or the classifier that `features` needs.
    """

    def __init__(self, folder: str, device: str, features: str = CLASSIFIER, weights: str | None = None) -> None:
        self.folder, self.device = folder, device
        root = Path(resolve(folder))
        try:
            self.images: Tensor | list[Path] = _images_of(root)
            self.classifier = load_classifier(root / "classifier")
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"reference={folder}: cannot be read: {first_line(error)}") from error
        if len(self.images) < 2:
            raise UserError(
                f"reference={folder}: no reference.safetensors and no two image files found "
                f"({', '.join(sorted(SUFFIXES))})"
            )
        if self.classifier is not None:
            self.classifier.to(device)
        self.network = self._network(features, weights)

    def _network(self, features: str, weights: str | None) -> FeatureNetwork:
        if features != CLASSIFIER:
            return InceptionNetwork(weights, self.device)
        if self.classifier is None or not isinstance(self.images, Tensor):
            raise UserError(
                f"reference={self.folder}: no reference.safetensors with a classifier/ found: say features=inception"
            )
        return ClassifierNetwork(self.classifier)

    @functools.cached_property
    @torch.no_grad()
    def features(self) -> Tensor:
        """Features `[m, f]` of the real images, on the CPU.

        Raises:
            UserError: some files cannot be read as images; names them.
        """
        return torch.cat([self.network(batch.to(self.device))[0].cpu() for batch in self._batches()])

    def _batches(self) -> Iterator[Tensor]:
        if isinstance(self.images, Tensor):
            yield from self.images.split(BATCH)
            return
        unreadable: list[str] = []
        for start in range(0, len(self.images), BATCH):
            batch = []
            for path in self.images[start : start + BATCH]:
                try:
                    with Image.open(path) as picture:
                        batch.append(to_inception(picture))
                except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
                    unreadable.append(path.name)
            if batch:
                yield torch.stack(batch).float() / 127.5 - 1
        if unreadable:
            named = ", ".join(unreadable[:NAMED_FILES]) + (", ..." if len(unreadable) > NAMED_FILES else "")
            raise UserError(
                f"reference={self.folder}: {len(unreadable)} of {len(self.images)} files cannot be read as images: "
                f"{named}: fix or remove them"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the network's weights and of the images, or of the image files' names, sizes and times."""
        digest = hashlib.sha256(fingerprint(self.network.module).encode())
        if isinstance(self.images, Tensor):
            digest.update(self.images.numpy().tobytes())
        else:
            for path in self.images:
                digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns};".encode())
        return digest.hexdigest()


def _images_of(root: Path) -> Tensor | list[Path]:
    if (root / "reference.safetensors").is_file():
        return to_images(load_file(root / "reference.safetensors")["pixels"])
    return sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES)
