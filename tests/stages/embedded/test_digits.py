from __future__ import annotations

import torch

from stages.embedded.digits import TRAIN_PER_CLASS, split, to_images


def test_no_image_is_on_both_sides_and_the_first_of_each_class_train() -> None:
    labels = torch.arange(10).repeat(500)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    pixels = torch.arange(5000)[:, None, None].expand(5000, 28, 28)
    (train, train_labels), (reference, reference_labels) = split(pixels, labels)
    assert train_labels.bincount().tolist() == [TRAIN_PER_CLASS] * 10
    assert reference_labels.bincount().tolist() == [500 - TRAIN_PER_CLASS] * 10
    chosen, held = set(train[:, 0, 0].tolist()), set(reference[:, 0, 0].tolist())
    assert chosen.isdisjoint(held)
    assert len(chosen | held) == 5000


def test_bytes_become_images_in_the_range_of_a_vae() -> None:
    images = to_images(torch.full((2, 28, 28), 255, dtype=torch.uint8))
    assert images.shape == (2, 1, 32, 32)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert bool((images[:, :, 2:30, 2:30] == 1).all())
