"""Real images to compare with, in the features of a network."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import safetensors
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stages.base.loading import first_line, resolve
from stages.errors import UserError
from stages.evaluate.feature_extractors import (
    CLASSIFIER,
    NETWORKS,
    ClassifierNetwork,
    FeatureNetwork,
    load_classifier,
    network_fingerprint,
    to_square,
)
from stages.evaluate.real_images import PIXELS, SUFFIXES, TABLE, read_real_images
from stages.evaluate.retrieval import Captions

BATCH = 100
NAMED_FILES = 3


class Reference:
    """Held-out real images, a feature network to compare them by, and optionally a classifier.

    Args:
        folder: a folder with `reference.safetensors` (`pixels`, bytes `[m, 28, 28]`), `reference.parquet` (`image`,
            `prompt`, optionally `category`) or image files (png, jpg, webp), and optionally `classifier/`.
        features: name of the feature network.
        model: folder, file or hub id of the feature network; by default the published one.

    Attributes:
        images: `[m, 1, 32, 32]` in [-1, 1], or encoded images of any size.
        captions: the images' prompts and categories, if they have any.
        classifier: the classifier for class accuracy, or None.

    Raises:
        UserError: the folder lacks images or the classifier that `features` needs, or there is no such network.
    """

    def __init__(self, folder: str, device: str, features: str = CLASSIFIER, model: str | None = None) -> None:
        self.folder, self.device = folder, device
        root = Path(resolve(folder))
        try:
            self.images = read_real_images(root)
            self.classifier = load_classifier(root / "classifier")
        except (OSError, KeyError, ValueError, safetensors.SafetensorError, pa.ArrowException) as error:
            raise UserError(
                f"reference={folder}: cannot be read: {first_line(error)}: name a folder of real images, or leave it out: "
                "reference=null"
            ) from error
        if len(self.images) < 2:
            raise UserError(
                f"reference={folder}: no {PIXELS}, {TABLE} or two image files found ({', '.join(sorted(SUFFIXES))})"
            )
        self.captions: Captions | None = None if isinstance(self.images, Tensor) else self.images.captions
        if self.classifier is not None:
            self.classifier.to(device)
        self.network = self._network(features, model)

    def _network(self, features: str, model: str | None) -> FeatureNetwork:
        if features != CLASSIFIER:
            return NETWORKS[features](model, self.device)
        if model is not None:
            raise UserError(f"features_model={model}: features={CLASSIFIER} takes the reference's: leave it out")
        if self.classifier is None or not isinstance(self.images, Tensor):
            raise UserError(
                f"reference={self.folder}: no {PIXELS} with a classifier/ found: say features={' or '.join(NETWORKS)}"
            )
        return ClassifierNetwork(self.classifier)

    @functools.cached_property
    @torch.no_grad()
    def features(self) -> Tensor:
        """Features `[m, f]` of the real images, on the CPU.

        Raises:
            UserError: some cannot be read as images; names them.
        """
        return torch.cat([self.network(batch.to(self.device))[0].cpu() for batch in self._batches()])

    def _batches(self) -> Iterator[Tensor]:
        if isinstance(self.images, Tensor):
            yield from self.images.split(BATCH)
            return
        assert self.network.size is not None  # the classifier takes no encoded images
        unreadable: list[str] = []
        batch: list[Tensor] = []
        for name, content in self.images:
            try:
                with Image.open(content) as picture:
                    batch.append(to_square(picture, self.network.size))
            except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
                unreadable.append(name)
            if len(batch) == BATCH:
                yield torch.stack(batch).float() / 127.5 - 1
                batch = []
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
        """A hash of the network and of the images, or of their files' names, sizes and times."""
        digest = hashlib.sha256(network_fingerprint(self.network).encode())
        images = self.images
        digest.update(images.numpy().tobytes() if isinstance(images, Tensor) else images.fingerprint.encode())
        return digest.hexdigest()
