from __future__ import annotations

import torch

from stages.embedded.digits import TRAIN_PER_CLASS, split, thicken, to_images


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


def test_thickened_strokes_are_a_pixel_wider_on_every_side() -> None:
    pixels = torch.zeros(1, 6, 6, dtype=torch.uint8)
    pixels[0, 1, 1], pixels[0, 4, 3] = 200, 100
    expected = torch.zeros(6, 6, dtype=torch.uint8)
    expected[3:6, 2:5] = 100
    expected[0:3, 0:3] = 200
    bold = thicken(pixels)
    assert bold.dtype == torch.uint8
    assert torch.equal(bold[0], expected)
