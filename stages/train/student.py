"""The student: the frozen denoiser of the dataset's teacher with an adapter attached."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.base import fingerprint, load_denoiser
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.stream import Batch


def describe_base(dataset: Dataset) -> dict[str, Any]:
    """What an adapter's folder tells of its data and its base: conditions, trained range, identity of the base."""
    teacher = dataset.info["teacher"]
    labels = dataset.info["conditions"]["class_labels"]
    return {
        "conditions": {"class_labels": {"classes": max(labels) + 1, "trained": labels}},
        "scale_range": dataset.info["guidance"]["scale_range"],
        "prediction_type": teacher["prediction_type"],
        "base": {
            key: teacher[key]
            for key in ("pretrained_model_name_or_path", "denoiser_class", "denoiser_subfolder", "denoiser_fingerprint")
        },
        "dataset_fingerprint": dataset.fingerprint,
    }


def load_base(dataset: Dataset, name_or_path: str | None, device: str) -> nn.Module:
    """The frozen denoiser that the records were made with.

    Raises:
        UserError: other weights are found there than the teacher had.
    """
    teacher = dataset.info["teacher"]
    path = name_or_path or teacher["pretrained_model_name_or_path"]
    dtype = getattr(torch, teacher["torch_dtype"])
    denoiser = load_denoiser(path, teacher["denoiser_subfolder"], teacher["denoiser_class"], dtype)
    found = fingerprint(denoiser)
    if found != teacher["denoiser_fingerprint"]:
        raise UserError(
            f"{path}: not the weights that made {dataset.root}: fingerprint {found[:12]}, the dataset has "
            f"{teacher['denoiser_fingerprint'][:12]}: name the teacher's own with pretrained_model_name_or_path=..."
        )
    return denoiser.to(device)


class Student:
    """Predicts the guided output of a batch in one conditional pass."""

    def __init__(self, denoiser: nn.Module, adapter: GuidanceAdapter) -> None:
        self.denoiser, self.adapter = denoiser, adapter.attach(denoiser)
        self.dtype = next(denoiser.parameters()).dtype

    @classmethod
    def create(cls, dataset: Dataset, config: AdapterConfig, name_or_path: str | None, device: str) -> Student:
        denoiser = load_base(dataset, name_or_path, device)
        return cls(denoiser, GuidanceAdapter.for_denoiser(config, denoiser, describe_base(dataset)).to(device))

    def predict(self, batch: Batch) -> Tensor:
        """The channels of the prediction that the target has `[n, c, ...]`; a learned variance beside them is left out."""
        with self.adapter.guidance_scale(batch.scale):
            output = self.denoiser(batch.latent, timestep=batch.timestep, **batch.cond, return_dict=False)[0]
        return output[:, : batch.target.shape[1]]
