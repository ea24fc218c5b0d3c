"""Copies of pictures stay on white, and only some may be mirrored."""

from __future__ import annotations

import torch

from stages.embedded.augmentation import mirror_some, transformed


def dots() -> torch.Tensor:
    """Twenty white pictures `[20, 3, 64, 64]` with a black square left of the middle."""
    images = torch.ones(20, 3, 64, 64)
    images[:, :, 28:36, 12:20] = -1
    return images


def test_only_pictures_that_may_be_mirrored_are() -> None:
    torch.manual_seed(0)
    images, allowed = dots(), torch.arange(20) < 10
    found = mirror_some(images, allowed)
    assert torch.equal(found[10:], images[10:])
    mirrored = (found != images).flatten(1).any(1)
    assert 0 < mirrored.sum() < 10
    assert torch.equal(found[mirrored], images[mirrored].flip(-1))


def test_copies_are_smaller_and_elsewhere_but_whole_and_on_white() -> None:
    torch.manual_seed(0)
    images = dots()
    found = transformed(images)
    assert found.shape == images.shape
    assert (found.min() >= -1) & (found.max() <= 1)
    edge = torch.cat([found[..., 0], found[..., -1], found[..., 0, :], found[..., -1, :]])
    assert torch.equal(edge, torch.ones_like(edge))
    share = (1 - found).flatten(1).sum(1) / (1 - images).flatten(1).sum(1)
    assert ((share > 0.68) & (share < 1.02)).all()
    assert len({tuple(picture.flatten().tolist()) for picture in found}) == 20
