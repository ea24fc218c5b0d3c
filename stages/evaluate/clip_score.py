"""CLIP score: the similarity of an image and its prompt, by a CLIP model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.multimodal.clip_score import CLIPScore

from stages.base.denoiser import fingerprint
from stages.base.loading import first_line, quieten, resolve
from stages.base.sampling import Condition
from stages.errors import UserError
from stages.evaluate.feature_extractors import as_tensor
from stages.evaluate.identity import settings_of


class ClipJudge:
    """Measures `max(100 cos(image, text), 0)` of each image and its prompt (arXiv 2104.08718, by torchmetrics).

    Args:
        name_or_path: a CLIP model with its processor, as transformers saves them.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: str) -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise UserError("clip_model: transformers is not installed: pip install '.[text]'") from error
        quieten()
        path = resolve(name_or_path)
        try:
            model, processor = CLIPModel.from_pretrained(path), CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"clip_model={name_or_path}: no CLIP model with its processor found: {first_line(error)}: name a folder or "
                "a hub id, or leave it out"
            ) from error
        self.settings = settings_of(processor.image_processor)
        self.metric = CLIPScore(lambda: (ClipEmbedding(model.eval()), processor)).to(device)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.metric.model) + json.dumps(self.settings, sort_keys=True, default=str)

    @torch.no_grad()
    def measure(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """`clip_score` `[n]` of images `[n, c, h, w]` in [-1, 1]."""
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        prompts = [condition["prompt"] for condition in conditions]
        scores = [self._score(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)]
        return {"clip_score": torch.stack(scores).float().cpu()}

    def _score(self, image: Tensor, prompt: str) -> Tensor:
        """The score of one image: torchmetrics averages before it bounds at zero, so images are scored one by one."""
        self.metric.reset()
        self.metric.update(image, prompt)
        return self.metric.compute()


class ClipEmbedding(nn.Module):
    """A CLIP model that returns tensors, as torchmetrics expects; newer transformers wrap them in an output object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *args: Any) -> Tensor:
        return as_tensor(self.model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> Tensor:
        return as_tensor(self.model.get_text_features(*args))
