"""Metrics of sets of images from stored features: torchmetrics', and those that it lacks or computes slowly."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from stages.base.denoiser import fingerprint
from stages.base.sampling import Condition
from stages.errors import UserError
from stages.evaluate.feature_extractors import network_fingerprint
from stages.evaluate.reference import Reference

FEATURES, SCORES = "features", "scores"
PROMPT = "prompt"  # the number of the image's prompt among those of the real images
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000  # a tenth of the usual number: the subsets overlap with few images
NEIGHBOURS = 3  # as in arXiv 1904.06991
CMMD_SIGMA, CMMD_FACTOR = 10, 1000  # as in arXiv 2401.09603
BLOCK = 2000


class ImageMetrics:
    """Measures images batch by batch, and computes the metrics of all of them.

    The reference's feature network gives Frechet distance (arXiv 1706.08500), kernel distance (1801.01401; in CLIP's
    features CMMD, 2401.09603), Inception Score (1606.03498) if it has classes, precision and recall (1904.06991), and
    the retrieval of real images if the prompts are theirs; its classifier gives class accuracy.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.values: list[dict[str, Tensor]] = []

    @property
    def fingerprint(self) -> str:
        """A hash of the networks and of the real images' prompts."""
        classifier, captions = self.reference.classifier, self.reference.captions
        known = hashlib.sha256(repr(captions.prompts).encode()).hexdigest() if captions is not None else ""
        judged = fingerprint(classifier) if classifier is not None else ""
        return network_fingerprint(self.reference.network) + judged + known

    def check(self, conditions: Sequence[Condition]) -> None:
        """
        Raises:
            UserError: some of the prompts are those of real images, and others are not.
        """
        if self.reference.captions is not None:
            self.reference.captions.check(conditions, f"reference={self.reference.folder}")

    @torch.no_grad()
    def measure(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Measure images: each value `[n, ...]`, on the CPU.

        `features`, `scores` if the network has classes, `prompt` if the prompts are those of real images, and
        `class_accuracy`, 0 or 1, if there is a classifier.

        Args:
            images: `[n, c, h, w]` in [-1, 1].
            conditions: the classes or captions of the images, all of one kind.
        """
        self.check_size(images)
        features, scores = self.reference.network(images)
        values = {FEATURES: features} | ({SCORES: scores} if scores.shape[1] else {})
        captions = self.reference.captions
        if captions is not None and (numbers := captions.numbers_of(conditions)) is not None:
            values[PROMPT] = numbers
        labels = [condition.get("class_label") for condition in conditions]
        if self.reference.classifier is not None and None not in labels:
            right = self.reference.classifier(images).argmax(1).cpu() == torch.tensor(labels)
            values["class_accuracy"] = right.float()
        return {name: value.cpu() for name, value in values.items()}

    def check_size(self, images: Tensor) -> None:
        """
        Raises:
            UserError: the real images are pixels of another size than the images `[n, c, h, w]`.
        """
        real = self.reference.images
        if isinstance(real, Tensor) and real.shape[1:] != images.shape[1:]:
            expected, found = ("x".join(map(str, batch.shape[1:])) for batch in (real, images))
            raise UserError(
                f"reference={self.reference.folder}: holds images of {expected}, and the pipeline makes {found}: name "
                "a folder of real images with features=inception or efficientnet_lite0, or leave it out: reference=null"
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
    means = {name: float(v.double().mean()) for name, v in values.items() if name not in (FEATURES, SCORES, PROMPT)}
    if reference is None:
        return means
    real, fake = (features.to(reference.device) for features in (reference.features, values[FEATURES]))
    found = {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": cmmd(real, fake) if reference.network.gaussian else kernel_distance(real, fake),
        "precision": share_inside(fake, real),
        "recall": share_inside(real, fake),
    }
    if SCORES in values:
        found["inception_score"] = inception_score(values[SCORES])
    if reference.captions is not None and PROMPT in values:
        found |= reference.captions.adherence(fake, values[PROMPT], real)
    return found | means


class PrecomputedFeatures(nn.Module):
    """The identity in place of a feature network, because torchmetrics receives the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """`|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))` of features `[m, f]` and `[n, f]` (arXiv 1706.08500, equation 6).

    The last trace is the sum of the singular values of `A B^T`, where `A^T A = C` and `B^T B = C'`: in 1,280 features
    ten times as fast as the eigenvalues of `C C'`, by which torchmetrics computes it.
    """
    (mean, root), (other_mean, other_root) = _moments(real), _moments(fake)
    spread = root.square().sum() + other_root.square().sum() - 2 * torch.linalg.svdvals(root @ other_root.T).sum()
    return float((mean - other_mean).square().sum() + spread)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `[f]` of features `[n, f]`, and an `A` `[min(n, f), f]` such that `A^T A` is their covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Squared maximum mean discrepancy of features `[m, f]`, `[n, f]`, cubic kernel, unbiased (arXiv 1801.01401)."""
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    with quiet():
        metric = KernelInceptionDistance(PrecomputedFeatures(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(_compute(metric)[0])


def cmmd(real: Tensor, fake: Tensor) -> float:
    """1,000 times the squared maximum mean discrepancy of features `[m, f]`, `[n, f]` of length 1, Gaussian kernel.

    The published CMMD (arXiv 2401.09603), which lacks a library: sigma is 10, and the estimator is biased.
    """
    real, fake = (functional.normalize(features.double(), dim=1) for features in (real, fake))
    return CMMD_FACTOR * (_mean_kernel(real, real) + _mean_kernel(fake, fake) - 2 * _mean_kernel(real, fake))


def _mean_kernel(one: Tensor, other: Tensor) -> float:
    """The mean of `exp(-|x - y|^2 / (2 sigma^2))` over the pairs of vectors `[m, f]`, `[n, f]` of length 1."""
    sums = [torch.exp((block @ other.T - 1) / CMMD_SIGMA**2).sum() for block in one.split(BLOCK)]
    return float(torch.stack(sums).sum()) / (len(one) * len(other))


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
