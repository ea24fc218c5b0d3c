"""Metrics of sets of images from stored features: torchmetrics', plus precision and recall, which it lacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from stages.base.denoiser import fingerprint
from stages.base.sampling import Condition
from stages.embedded.attributes import attributes, read_caption
from stages.errors import UserError
from stages.evaluate.reference import Reference

FEATURES, SCORES = "features", "scores"
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000  # a tenth of the usual number: the subsets overlap with few images
NEIGHBOURS = 3  # as in arXiv 1904.06991
BLOCK = 2000


class ImageMetrics:
    """Measures images batch by batch, and computes the metrics of all of them.

    The reference's feature network gives Frechet distance (arXiv 1706.08500), kernel distance (1801.01401), Inception
    Score (1606.03498), precision and recall (1904.06991); its classifier gives class accuracy. If the prompts are
    captions of measured attributes (`stages.embedded.attributes`), the share of images that meet them is measured, too.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.values: list[dict[str, Tensor]] = []

    @property
    def fingerprint(self) -> str:
        """A hash of the networks' weights."""
        classifier = self.reference.classifier
        return fingerprint(self.reference.network.module) + (fingerprint(classifier) if classifier is not None else "")

    @torch.no_grad()
    def measure(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Measure images: `features`, `scores` and the conditions that each image meets, each `[n, ...]`, on the CPU.

        Args:
            images: `[n, c, h, w]` in [-1, 1].
            conditions: the classes or captions of the images, all of one kind.
        """
        self._check_size(images)
        features, scores = self.reference.network(images)
        values = {FEATURES: features, SCORES: scores}
        labels = [condition.get("class_label") for condition in conditions]
        if self.reference.classifier is not None and None not in labels:
            right = self.reference.classifier(images).argmax(1).cpu() == torch.tensor(labels)
            values["class_accuracy"] = right.float()
        captions = [read_caption(condition.get("prompt", "")) for condition in conditions]
        if self.reference.classifier is not None and None not in captions:
            met = attributes(images).cpu() == torch.tensor([caption[1:] for caption in captions if caption])
            values |= dict(zip(("stroke_accuracy", "slant_accuracy"), met.float().T, strict=True))
        return {name: value.cpu() for name, value in values.items()}

    def _check_size(self, images: Tensor) -> None:
        real = self.reference.images
        if isinstance(real, Tensor) and real.shape[1:] != images.shape[1:]:
            expected, found = ("x".join(map(str, batch.shape[1:])) for batch in (real, images))
            raise UserError(
                f"reference={self.reference.folder}: holds images of {expected}, and the pipeline makes {found}: name "
                "a folder of real images with features=inception, or leave it out: reference=null"
            )

    def update(self, images: Tensor, conditions: Sequence[Condition]) -> None:
        """Add images `[n, c, h, w]` in [-1, 1] of these classes or captions."""
        self.values.append(self.measure(images, conditions))

    def compute(self) -> dict[str, float]:
        """The metrics of all images so far."""
        joined = {name: torch.cat([values[name] for values in self.values]) for name in self.values[0]}
        return summary(joined, self.reference)


def summary(values: dict[str, Tensor], reference: Reference | None) -> dict[str, float]:
    """The metrics of images from their measurements: features against the reference's, all others by their mean."""
    means = {name: float(v.double().mean()) for name, v in values.items() if name not in (FEATURES, SCORES)}
    if reference is None:
        return means
    real, fake = (features.to(reference.device) for features in (reference.features, values[FEATURES]))
    return {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": kernel_distance(real, fake),
        "inception_score": inception_score(values[SCORES]),
        "precision": share_inside(fake, real),
        "recall": share_inside(real, fake),
        **means,
    }


class PrecomputedFeatures(nn.Module):
    """The identity in place of a feature network, because torchmetrics receives the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """`|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))` of features `[m, f]` and `[n, f]` (arXiv 1706.08500, equation 6)."""
    return _compare(FrechetInceptionDistance(PrecomputedFeatures(real.shape[1])), real.double(), fake.double())


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Squared maximum mean discrepancy of features `[m, f]`, `[n, f]`, cubic kernel, unbiased (arXiv 1801.01401)."""
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    with quiet():
        metric = KernelInceptionDistance(PrecomputedFeatures(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    return _compare(metric, real, fake)


def _compare(metric: Any, real: Tensor, fake: Tensor) -> float:
    metric.to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    found = _compute(metric)
    return float(found[0] if isinstance(found, tuple) else found)


def inception_score(scores: Tensor) -> float:
    """`exp(E KL(p(y|x) || p(y)))` of class scores `[n, k]` (logits), the mean over ten splits (arXiv 1606.03498)."""
    with quiet():
        metric = InceptionScore(PrecomputedFeatures(scores.shape[1]))
    metric.update(scores)
    return float(_compute(metric)[0])


def _compute(metric: Any) -> Any:
    """A metric's value, with random subsets from a fixed seed."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        return metric.compute()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torchmetrics' warnings about its memory use and about the deviation of a single split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def share_inside(points: Tensor, manifold: Tensor) -> float:
    """The share of points `[n, f]` inside a manifold that is estimated from other points `[m, f]`.

    arXiv 1904.06991, equations 1 and 2: the manifold is the union of balls around its points, each with the distance to
    the third nearest neighbour as its radius. Precision is the share of generated images inside the manifold of the
    real ones, recall the share of real images inside that of the generated ones.
    """
    points, manifold = points.double(), manifold.double()
    nearest = min(NEIGHBOURS, len(manifold) - 1) + 1  # each point is its own nearest
    radii = torch.cat([torch.cdist(block, manifold).kthvalue(nearest).values for block in manifold.split(BLOCK)])
    inside = [(torch.cdist(block, manifold) <= radii).any(dim=1) for block in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())
