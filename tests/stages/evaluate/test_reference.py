from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stages.errors import UserError
from stages.evaluate import reference as module
from stages.evaluate.evaluation import remember_features
from stages.evaluate.feature_extractors import InceptionNetwork, to_inception
from stages.evaluate.reference import Reference


class Means:
    """In InceptionV3's place: the mean of each colour."""

    def __init__(self, weights: str | None, device: str) -> None:
        self.module = nn.Linear(1, 1)
        self.seen = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        return images.mean(dim=(2, 3)), images.mean(dim=(2, 3))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of as many kinds and sizes."""
    monkeypatch.setattr(module, "InceptionNetwork", Means)
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


def test_files_that_are_no_images_are_named_in_one_line(pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no image")
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    with pytest.raises(UserError) as raised:
        _ = Reference(str(pictures), "cpu", features="inception").features
    assert "2 of 5 files cannot be read as images: broken.png, cut.png" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_features_are_kept_until_a_file_changes(pictures: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "features.safetensors"
    first = Reference(str(pictures), "cpu", features="inception")
    remember_features(first, kept)
    again = Reference(str(pictures), "cpu", features="inception")
    again.network.module.load_state_dict(first.network.module.state_dict())
    remember_features(again, kept)
    assert again.network.seen == 0  # type: ignore[attr-defined]
    assert torch.equal(again.features, first.features)
    Image.new("RGB", (8, 8)).save(pictures / "d.png")
    more = Reference(str(pictures), "cpu", features="inception")
    remember_features(more, kept)
    assert len(more.features) == 4


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference=.*no reference.safetensors and no two image files"):
        Reference(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="reference=nowhere: cannot be read"):
        Reference("nowhere", "cpu")


def test_image_files_without_a_classifier_ask_for_another_network(pictures: Path) -> None:
    with pytest.raises(UserError, match="say features=inception"):
        Reference(str(pictures), "cpu")


def test_a_missing_library_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        UserError, match=r"features=inception: torch-fidelity cannot be used: .*pip install '.\[inception\]'"
    ):
        InceptionNetwork(None, "cpu")


def test_the_published_network_gives_features_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError), reason="not installed")
    with pytest.raises(UserError, match="inception_weights=.*nowhere"):
        InceptionNetwork(str(tmp_path / "nowhere.pth"), "cpu")
    with monkeypatch.context() as patch:
        inception = sys.modules[fidelity.FeatureExtractorInceptionV3.__module__]
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(InceptionNetwork(None, "cpu").module.state_dict(), tmp_path / "weights.pth")
    features, scores = InceptionNetwork(str(tmp_path / "weights.pth"), "cpu")(torch.rand(2, 1, 32, 32) * 2 - 1)
    assert (features.shape, scores.shape) == ((2, 2048), (2, 1008))


def test_the_middle_square_of_a_picture_is_seen() -> None:
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    assert to_inception(picture).shape == (3, 299, 299)
    assert to_inception(picture)[:, :, 3:-3].min() == 255
