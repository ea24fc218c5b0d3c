"""The student: the frozen denoiser of the dataset's teacher with an adapter attached."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters import AdapterConfig, GuidanceAdapter
from stages.adapters.conditioning import find_conditions
from stages.adapters.guidance import Guidance, as_scales
from stages.base import load_denoiser
from stages.denoiser import NEGATIVE, fingerprint, latent_name, unflatten
from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.records.record import CONDITION_PREFIX
from stages.train.stream import Batch

BASE_KEYS = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "pipeline_class",
    "denoiser_class",
    "denoiser_subfolder",
    "denoiser_fingerprint",
)


def describe_base(dataset: Dataset, scale_range: list[float] | None = None) -> dict[str, Any]:
    """What an adapter's folder tells of its data and its base: conditions, trained range, identity of the base.

    Args:
        scale_range: what the run was restricted to.
    """
    teacher, conditions = dataset.info["teacher"], dataset.info["conditions"]
    low, high = dataset.info["guidance"]["scale_range"]
    least, most = scale_range or [low, high]
    return {
        "conditions": find_conditions(condition_tensors(dataset), max(conditions["class_labels"], default=0) + 1),
        "sampled": conditions,
        "arguments": teacher["arguments"],
        "scale_range": [max(low, least), min(high, most)],
        "guidance_rule": dataset.info["guidance"]["rule"],
        "prediction_type": teacher["prediction_type"],
        "timestep_scale": teacher["layout"]["timestep_scale"],
        "unconditional": unconditional_place(teacher["layout"]),
        "base": {key: teacher[key] for key in BASE_KEYS},
        "dataset_fingerprint": dataset.fingerprint,
    }


def unconditional_place(layout: dict[str, Any]) -> dict[str, int] | None:
    """Where a guided step of the pipeline has its unconditional part; None where that is not known."""
    if layout.get("unconditional") is None:
        return None
    call, chunk = layout["unconditional"]
    return {"call": call, "chunk": chunk, "chunks": layout["chunks"]}


def condition_tensors(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Dtype and shape of the conditional inputs that the records hold, by the denoiser's own names."""
    return {
        name.removeprefix(CONDITION_PREFIX): told
        for name, told in dataset.info["tensors"].items()
        if name.startswith(CONDITION_PREFIX)
    }


def load_base(dataset: Dataset, name_or_path: str | None, device: str) -> nn.Module:
    """The frozen denoiser that the records were made with.

    Raises:
        UserError: other weights are found there than the teacher had.
    """
    teacher = dataset.info["teacher"]
    path = name_or_path or teacher["pretrained_model_name_or_path"]
    dtype = getattr(torch, teacher["torch_dtype"])
    source = {} if name_or_path else {key: teacher[key] for key in ("revision", "variant")}
    denoiser = load_denoiser(path, teacher["denoiser_subfolder"], teacher["denoiser_class"], dtype, **source)
    found = fingerprint(denoiser)
    if found != teacher["denoiser_fingerprint"]:
        raise UserError(
            f"{path}: not the weights that made {dataset.root}: fingerprint {found[:12]}, the dataset has "
            f"{teacher['denoiser_fingerprint'][:12]}: name the teacher's own with pretrained_model_name_or_path=..."
        )
    return denoiser.to(device)


class Student:
    """Predicts the guided output of a batch in one conditional pass.

    Args:
        constants: the denoiser's arguments that are the same in every call, as `dataset.json` tells them.
    """

    def __init__(self, denoiser: nn.Module, adapter: GuidanceAdapter, constants: dict[str, Any]) -> None:
        self.denoiser, self.adapter = denoiser, adapter.attach(denoiser)
        self.constants = constants
        self.dtype = next(denoiser.parameters()).dtype
        self.latent = latent_name(denoiser)

    @classmethod
    def create(
        cls,
        dataset: Dataset,
        config: AdapterConfig,
        name_or_path: str | None,
        device: str,
        scale_range: list[float] | None = None,
    ) -> Student:
        denoiser = load_base(dataset, name_or_path, device)
        adapter = GuidanceAdapter.for_denoiser(config, denoiser, describe_base(dataset, scale_range)).to(device)
        return cls(denoiser, adapter, dataset.info["teacher"]["layout"]["constants"])

    def predict(self, batch: Batch) -> Tensor:
        """The channels of the prediction that the target has `[n, c, ...]`; a learned variance beside them is left out."""
        constants = {name: restored(value, len(batch), batch.latent.device) for name, value in self.constants.items()}
        inputs = {self.latent: batch.latent, "timestep": batch.timestep, "return_dict": False}
        negative = {name: value for name, value in batch.cond.items() if name.startswith(NEGATIVE)}
        cond = {name: value for name, value in batch.cond.items() if name not in negative}
        with self.adapter.in_force(Guidance(as_scales(batch.scale)[None], negative=negative)):
            output = self.denoiser(**inputs, **unflatten({**constants, **cond}))[0]
        return output[:, : batch.target.shape[1]]


def restored(value: Any, n: int, device: torch.device) -> Any:
    """A constant argument from its JSON, for a batch of n (the inverse of `stages.generate.layout.constant`)."""
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device)
    return [value["each"]] * n if isinstance(value, dict) else value
