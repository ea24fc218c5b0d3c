"""The effective scale of latents whose position among CFG's is known."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.evaluate.effective_scale import effective_scale, squared_distances
from stages.evaluate.parts import Parts, Result

SCALES = [1.0, 2.0, 4.0]


def of_cfg() -> list[Tensor]:
    """Return latents `[5, 2, 3, 3]` at each scale: a path with a bend at scale 2."""
    start, first, second = torch.randn(3, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return [start, start + first, start + first + second]


def between(measured: list[Tensor]) -> list[float]:
    return [squared_distances(a, [b]).mean().item() for a, b in itertools.pairwise(measured)]


def effective(latents: Tensor, measured: list[Tensor]) -> float:
    distances = squared_distances(latents, measured).mean(dim=0).tolist()
    return effective_scale(distances, between(measured), SCALES)


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0, 2.5, 3.9, 4.0])
def test_samples_between_measured_scales_are_interpolated(scale: float) -> None:
    low, middle, high = measured = of_cfg()
    share = scale - 1 if scale <= 2 else (scale - 2) / 2
    latents = low + share * (middle - low) if scale <= 2 else middle + share * (high - middle)
    assert effective(latents, measured) == pytest.approx(scale)


def test_samples_off_the_path_have_the_scale_of_the_nearest_point() -> None:
    low, middle, high = measured = of_cfg()
    aside = torch.randn_like(low)
    along = high - middle
    aside -= (aside * along).sum() / along.square().sum() * along
    assert effective(middle + 0.25 * along + 0.1 * aside, measured) == pytest.approx(2.5)


def test_samples_beyond_the_path_have_the_scale_of_its_end() -> None:
    low, middle, high = measured = of_cfg()
    assert effective(low - 0.5 * (middle - low), measured) == 1
    assert effective(high + 0.5 * (high - middle), measured) == 4


def test_guidance_without_effect_has_scale_one() -> None:
    same = torch.zeros(2, 1, 1, 1)
    assert effective(same, [same] * 3) == 1


def test_parts_give_the_same_values_as_one_part(tmp_path: Path) -> None:
    measured = of_cfg()
    distances = squared_distances(measured[1] + 0.3, measured)
    shown = torch.zeros(0, 1, 1, 1, dtype=torch.uint8)
    whole, halves = (Parts(tmp_path / name, "same", count) for name, count in (("whole", 1), ("halves", 2)))
    whole.write(0, [], [Result({"distances": distances}, shown, 1, 1.0, None)])
    for part, some in enumerate((distances[:2], distances[2:])):
        halves.write(part, [], [Result({"distances": some}, shown, 1, 1.0, None)])
    assert torch.equal(whole.values(0, "distances"), distances)
    assert torch.equal(halves.values(0, "distances"), distances)
