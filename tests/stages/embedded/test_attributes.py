from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from stages.embedded.attributes import (
    NUMERALS,
    SLANTS,
    STROKES,
    attributes,
    caption,
    read_caption,
    slant,
    stroke_width,
)
from stages.evaluate.metrics import Reference


def bar(width: float, lean: float = 0.0) -> torch.Tensor:
    """Return a soft-edged bar `[1, 1, 64, 64]` of this width, sheared to the right."""
    y = torch.arange(64.0).view(-1, 1) - 31.5
    x = torch.arange(64.0).view(1, -1) - 31.5 + lean * y
    ink = torch.sigmoid(4 * (width / 2 - x.abs())) * (y.abs() < 20)
    return (2 * ink - 1)[None, None]


@pytest.mark.parametrize("width", [3.0, 5.0, 8.0])
def test_the_width_of_a_long_bar_is_its_width(width: float) -> None:
    assert float(stroke_width(bar(width))) == pytest.approx(width * 40 / (40 + width), rel=0.05)


@pytest.mark.parametrize("lean", [-0.4, 0.0, 0.3])
def test_the_slant_of_a_sheared_bar_is_its_shear(lean: float) -> None:
    assert float(slant(bar(4.0, lean))) == pytest.approx(lean, abs=0.02)
    turned = functional.pad(bar(4.0, lean), (7, 0, 3, 0), value=-1)
    assert float(slant(turned)) == pytest.approx(lean, abs=0.02)


def test_each_word_applies_to_about_a_third_of_the_digits() -> None:
    found = attributes(Reference("stages/embedded/digits", "cpu").images)
    for column in found.T:
        shares = column.bincount(minlength=3) / len(column)
        assert shares.min() > 0.27
        assert shares.max() < 0.4


def test_captions_are_read_back() -> None:
    assert caption(7, 2, 2) == "a bold seven leaning right"
    every = [(i, j, k) for i in range(len(NUMERALS)) for j in range(len(STROKES)) for k in range(len(SLANTS))]
    assert [read_caption(caption(*info)) for info in every] == every
    assert len({caption(*info) for info in every}) == math.prod((10, 3, 3))
    assert read_caption("a bold cat") is None


def test_an_empty_image_has_attributes_too() -> None:
    assert attributes(-torch.ones(1, 1, 32, 32)).shape == (1, 2)
