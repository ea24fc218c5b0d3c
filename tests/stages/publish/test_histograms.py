"""Histograms as pictures."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from PIL import Image

from stages.errors import UserError
from stages.publish.histograms import plot

BINS = [{"from": 1.0, "to": 2.0, "count": 3}, {"from": 2.0, "to": 3.0, "count": 0}]


@pytest.mark.parametrize("histogram", [BINS, {"3": 1, "7": 2}, {str(i): i for i in range(1000)}])
def test_each_kind_is_drawn_and_the_same_each_time(histogram: Any) -> None:
    picture = plot("scale", histogram)
    assert Image.open(io.BytesIO(picture)).size == (500, 260)
    assert plot("scale", histogram) == picture


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib is not installed: pip install"):
        plot("scale", BINS)
