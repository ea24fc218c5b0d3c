from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import UserError
from stages.evaluate.evaluation import cache_features
from stages.evaluate.feature_extractors import NETWORKS
from stages.evaluate.metrics import ImageMetrics
from stages.evaluate.reference import Reference
from tests.stages.evaluate.test_real_images import encoded, write_digits, write_table


class Means:
    """A stand-in for InceptionV3: the mean of each colour."""

    gaussian, normalisation, size = False, (), 299

    def __init__(self, model: str | None, device: str) -> None:
        self.module = nn.Linear(1, 1)
        self.seen = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        return images.mean(dim=(2, 3)), images.mean(dim=(2, 3))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of three formats and sizes."""
    monkeypatch.setitem(NETWORKS, "inception", Means)
    for name, size, colour in (
        ("a.png", (40, 30), "red"),
        ("b.JPG", (300, 400), "blue"),
        ("c.webp", (64, 64), "white"),
    ):
        Image.new("RGB", size, colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_image_files_of_any_size_are_compared_with(pictures: Path) -> None:
    features = Reference(str(pictures), "cpu", features="inception").features
    expected = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [1, 1, 1]])
    torch.testing.assert_close(features, expected, atol=0.02, rtol=0)


def test_unreadable_images_are_named_in_one_line(pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no image")
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    with pytest.raises(UserError) as raised:
        _ = Reference(str(pictures), "cpu", features="inception").features
    assert "2 of 5 files cannot be read as images: broken.png, cut.png" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_features_are_cached_until_a_file_changes(pictures: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "features.safetensors"
    first = Reference(str(pictures), "cpu", features="inception")
    cache_features(first, kept)
    again = Reference(str(pictures), "cpu", features="inception")
    again.network.module.load_state_dict(first.network.module.state_dict())
    cache_features(again, kept)
    assert again.network.seen == 0  # type: ignore[attr-defined]
    assert torch.equal(again.features, first.features)
    Image.new("RGB", (8, 8)).save(pictures / "d.png")
    more = Reference(str(pictures), "cpu", features="inception")
    cache_features(more, kept)
    assert len(more.features) == 4


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference=.*no reference.safetensors, reference.parquet or two image files"):
        Reference(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="reference=nowhere: cannot be read"):
        Reference("nowhere", "cpu")


def test_image_files_without_a_classifier_need_another_network(pictures: Path) -> None:
    with pytest.raises(UserError, match="say features=inception or efficientnet_lite0"):
        Reference(str(pictures), "cpu")
    with pytest.raises(UserError, match="features_model=mine: features=classifier takes the reference's: leave it out"):
        Reference("stages/embedded/digits", "cpu", model="mine")


def test_the_rows_of_a_table_are_compared_with_in_their_order(pictures: Path) -> None:
    rows = [encoded(Image.new("RGB", (20, 30), colour)) for colour in ("white", "red")]
    write_table(pictures, rows, prompt=["a", "b"])
    reference = Reference(str(pictures), "cpu", features="inception")
    torch.testing.assert_close(reference.features, torch.tensor([[1.0, 1, 1], [1, -1, -1]]))
    assert reference.captions is not None
    assert reference.captions.prompts == ["a", "b"]
    before = reference.fingerprint
    write_table(pictures, [*rows, b"no picture"], prompt=["a", "b", "c"])
    changed = Reference(str(pictures), "cpu", features="inception")
    assert changed.fingerprint != before
    with pytest.raises(UserError, match="1 of 3 files cannot be read as images: row 3 of reference.parquet: fix"):
        _ = changed.features


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "reference.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=f"reference={tmp_path}: cannot be read: ") as raised:
        Reference(str(tmp_path), "cpu", features="efficientnet_lite0")
    assert "\n" not in str(raised.value)


def test_real_pictures_are_nearest_to_themselves_in_a_third_partys_features(tmp_path: Path) -> None:
    """EfficientNet-Lite0 finds a moved or softened digit among the digits, and none in noise."""
    images = write_digits(tmp_path, 24)
    reference = Reference(str(tmp_path), "cpu", features="efficientnet_lite0")
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    conditions = [{"prompt": f"picture {i}"} for i in range(24)]
    found = []
    for shown in (images, images.roll(1, dims=3), images + 0.3 * (blurred - images), noise):
        metrics = ImageMetrics(reference)
        metrics.update(shown, conditions)
        found.append(metrics.compute())
    itself, moved, soft, nothing = found
    assert (itself["retrieval_top1"], itself["category_accuracy"]) == (1, 1)
    assert moved["retrieval_top1"] > 0.9
    assert soft["retrieval_top5"] > 0.9 > 0.5 > nothing["retrieval_top5"]
    distances = [row["frechet_distance"] for row in found]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert itself["inception_score"] > 1
