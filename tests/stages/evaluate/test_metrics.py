from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from stages.base.sampling import Condition
from stages.errors import UserError
from stages.evaluate.metrics import (
    ImageMetrics,
    PrecomputedFeatures,
    cmmd,
    frechet_distance,
    inception_score,
    kernel_distance,
    share_inside,
    summary,
)
from stages.evaluate.reference import Reference

DIGITS = "stages/embedded/digits"
METRICS = {"frechet_distance", "kernel_distance", "inception_score", "precision", "recall"}


@pytest.fixture(scope="module")
def digits() -> Reference:
    return Reference(DIGITS, "cpu")


def classes(labels: list[int]) -> list[Condition]:
    return [{"class_label": label} for label in labels]


def gaussian(mean: float, deviation: float, n: int = 20_000, seed: int = 0) -> torch.Tensor:
    return deviation * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) + mean


def test_the_distance_of_two_gaussians_is_exact() -> None:
    """|m|^2 + trace(A + B - 2 sqrt(AB)) for features N(0, 1) and N(m, s^2) in each of two dimensions."""
    found = frechet_distance(gaussian(0, 1), gaussian(3, 2, seed=1))
    assert found == pytest.approx(2 * 9 + 2 * (1 + 4 - 2 * 2), rel=0.03)


@pytest.mark.parametrize("counts", [(200, 150), (20, 30), (200, 30)])
def test_the_distance_is_torchmetrics_for_many_images_and_for_fewer_than_features(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator)
    real, fake = (torch.randn(n, 40, generator=generator) @ mix + i for i, n in enumerate(counts))
    metric = FrechetInceptionDistance(PrecomputedFeatures(40)).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_the_cmmd_of_two_points_is_exact() -> None:
    """Of unit vectors at a right angle, 1000 (k(a, a) + k(b, b) - 2 k(a, b)); lengths do not matter."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
    expected = 1000 * (1 + 1 - 2 * math.exp(-2 / (2 * 10**2)))
    assert cmmd(a.expand(50, 2), b.expand(70, 2)) == pytest.approx(expected, rel=1e-6)
    assert abs(cmmd(gaussian(0, 1, n=300), gaussian(0, 1, n=300))) < 1e-9


def test_a_network_without_classes_has_no_inception_score_and_may_have_another_kernel(digits: Reference) -> None:
    metrics = ImageMetrics(digits)
    assert isinstance(digits.images, torch.Tensor)
    values = metrics.measure(digits.images[:50], [{}] * 50)
    values.pop("scores")
    found = summary(values, digits)
    assert found.keys() == METRICS - {"inception_score"}
    unlike = SimpleNamespace(device="cpu", features=digits.features, captions=None)
    unlike.network = SimpleNamespace(gaussian=True)
    expected = cmmd(digits.features, values["features"])
    assert summary(values, unlike)["kernel_distance"] == expected != found["kernel_distance"]  # type: ignore[arg-type]


def test_the_kernel_distance_of_two_points_is_exact() -> None:
    """k(x, y) = (x y / 2 + 1)^3 in two dimensions; for sets of one point each, k(a, a) + k(b, b) - 2 k(a, b)."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (1 / 2 + 1) ** 3 + (4 / 2 + 1) ** 3 - 2 * 1
    assert kernel_distance(a.expand(50, 2), b.expand(70, 2)) == pytest.approx(expected, rel=1e-4)


def test_identical_sets_have_no_distance_and_cover_each_other() -> None:
    one = gaussian(0, 1, n=500)
    assert abs(frechet_distance(one, one)) < 1e-6
    assert share_inside(one, one) == 1


def test_the_kernel_distance_of_a_set_to_itself_is_the_estimators_own_bias() -> None:
    """The bias is -2 / n times the excess of k(x, x) over k(x, y): negligible next to any real distance."""
    one = gaussian(0, 1, n=500)
    kernel = (one @ one.T / 2 + 1) ** 3
    same = kernel.diagonal().mean()
    others = (kernel.sum() - kernel.diagonal().sum()) / (500 * 499)
    assert kernel_distance(one, one) == pytest.approx(float(-2 / 500 * (same - others)), rel=1e-3)
    assert abs(kernel_distance(one, one)) < 0.02 * kernel_distance(one, one + 1)


def test_distant_sets_do_not_cover_each_other() -> None:
    one, other = gaussian(0, 1, n=300), gaussian(100, 1, n=200, seed=1)
    assert share_inside(one, other) == share_inside(other, one) == 0


def test_precision_and_recall_differ_when_half_is_missing() -> None:
    """Real images form two clusters; images generated in one of them are precise but lack half."""
    near, far = gaussian(0, 1, n=400), gaussian(100, 1, n=400, seed=1)
    real, fake = torch.cat([near, far]), gaussian(0, 1, n=400, seed=2)
    assert share_inside(fake, real) > 0.95
    assert share_inside(real, fake) == pytest.approx(0.5, abs=0.03)


def test_a_ball_reaches_its_third_neighbour() -> None:
    """Points 0, 1, 2, ... on a line have radii of at least 2; the first one's third neighbour is at 3."""
    line = torch.arange(10.0)[:, None]
    assert share_inside(torch.tensor([[-3.0]]), line) == 1
    assert share_inside(torch.tensor([[-3.1]]), line) == 0


def test_the_inception_score_is_the_number_of_classes_that_are_sure_and_even() -> None:
    sure = 50 * torch.eye(4).repeat(100, 1)
    assert inception_score(sure) == pytest.approx(4, rel=0.05)
    assert inception_score(torch.zeros(100, 4)) == pytest.approx(1)
    assert inception_score(sure) == inception_score(sure)


def test_the_digits_themselves_reach_the_best_values(digits: Reference) -> None:
    assert isinstance(digits.images, torch.Tensor)
    assert digits.classifier is not None
    metrics = ImageMetrics(digits)
    for images in digits.images.split(500):
        metrics.update(images, classes(digits.classifier(images).argmax(1).tolist()))
    found = metrics.compute()
    assert found.keys() == METRICS | {"class_accuracy"}
    assert abs(found["frechet_distance"]) < 0.01
    assert abs(found["kernel_distance"]) < 30  # no guidance: 900
    assert (found["precision"], found["recall"], found["class_accuracy"]) == (1, 1, 1)
    assert 8 < found["inception_score"] <= 10
    assert all(math.isfinite(value) for value in found.values())


def test_images_of_another_size_than_the_digits_are_refused(digits: Reference) -> None:
    with pytest.raises(
        UserError, match="holds images of 1x32x32, and the pipeline makes 3x64x64: .*features=inception"
    ):
        ImageMetrics(digits).update(torch.zeros(2, 3, 64, 64), classes([0, 1]))
