"""The records of a trajectory, and their encoding as the members of a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stages.base.denoiser import STEP
from stages.records.schema import TensorSpec

CONDITION_PREFIX = "cond."
PER_RECORD = ("latent", "timestep", "target", "guidance_cosine", "guidance_delta")


@dataclass(frozen=True)
class Trajectory:
    """The records of a sampling run, or of a part of one.

    Attributes:
        index: number in the plan.
        part: number of this part; a long trajectory is stored in several.
        seed: of its initial noise.
        scale: guidance scale, `w` in `u + w (c - u)` (diffusers' convention: 1 is no guidance).
        condition: the sampled condition, e.g. `{"class_label": 7}`.
        latent: `[k, ...]`, the denoiser's input in each of k steps, after the scheduler scaled it.
        timestep: `[k]`, as the denoiser receives it.
        target: `[k, ...]`, the guided prediction that the scheduler receives, in the model's prediction type.
        cond: every other tensor input of the conditional pass, by the denoiser's own argument names.
        guidance_cosine: `[k]`, cosine similarity of the conditional prediction and the target, over all their elements.
        guidance_delta: `[k]`, mean square of the target less the conditional prediction.
            Both are float32, computed before the tensors are rounded for storage.
        steps: `[k, ...]`, the inputs that change from step to step, named `step.NAME`.
        denoiser: the denoiser that predicted, by its name in the pipeline.
    """

    index: int
    seed: int
    scale: float
    condition: dict[str, Any]
    latent: Tensor
    timestep: Tensor
    target: Tensor
    cond: dict[str, Tensor]
    guidance_cosine: Tensor
    guidance_delta: Tensor
    part: int = 0
    steps: dict[str, Tensor] = field(default_factory=dict)
    denoiser: str = ""

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def key(self) -> str:
        """The sample's name in its shard: digits and `_` only, because a dot ends a WebDataset key."""
        return f"{self.index:09d}_{self.part:04d}"

    def per_record(self) -> dict[str, Tensor]:
        """Return the tensors with an entry per record `[k, ...]`, by name."""
        return {name: getattr(self, name) for name in PER_RECORD} | self.steps

    def parts(self, size: int) -> Iterator[Trajectory]:
        """Split the records into samples of at most `size` records."""
        for part, start in enumerate(range(0, len(self), size), start=self.part):
            chosen: Any = {name: value[start : start + size] for name, value in self.per_record().items()}
            steps = {name: chosen.pop(name) for name in self.steps}
            yield replace(self, part=part, steps=steps, **chosen)

    def to_members(self) -> dict[str, bytes]:
        """Encode the sample's members by suffix: the tensors, and their metadata as JSON."""
        tensors = self.per_record() | {CONDITION_PREFIX + name: value for name, value in self.cond.items()}
        metadata = {
            "trajectory": self.index,
            "part": self.part,
            "seed": self.seed,
            "scale": self.scale,
            "condition": self.condition,
            "denoiser": self.denoiser,
        }
        return {
            "json": json.dumps(metadata, sort_keys=True).encode(),
            "safetensors": safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}),
        }


def from_members(tensors: bytes, metadata: bytes) -> Trajectory:
    """Decode the output of `Trajectory.to_members`.

    Raises:
        ValueError: the bytes are not those of a sample.
    """
    try:
        fields = json.loads(metadata)
        named = safetensors.torch.load(tensors)
        return Trajectory(
            index=fields["trajectory"],
            part=fields["part"],
            seed=fields["seed"],
            scale=fields["scale"],
            condition=fields["condition"],
            latent=named.pop("latent"),
            timestep=named.pop("timestep"),
            target=named.pop("target"),
            guidance_cosine=named.pop("guidance_cosine"),
            guidance_delta=named.pop("guidance_delta"),
            denoiser=fields["denoiser"],
            steps={name: value for name, value in named.items() if name.startswith(STEP)},
            cond={
                name.removeprefix(CONDITION_PREFIX): value
                for name, value in named.items()
                if name.startswith(CONDITION_PREFIX)
            },
        )
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise ValueError(f"not a sample of records: {error}") from error


def decode(sample: dict[str, Any]) -> Trajectory:
    """Decode a sample of a stock reader: `webdataset.WebDataset(shards).map(decode)`."""
    return from_members(sample["safetensors"], sample["json"])


def tensor_specs(trajectory: Trajectory) -> dict[str, TensorSpec]:
    """Return dtype and shape of one record's tensors by name, as `dataset.json` stores them."""
    tensors = {name: value[0] for name, value in trajectory.per_record().items()}
    tensors |= {CONDITION_PREFIX + name: value for name, value in trajectory.cond.items()}
    return {name: TensorSpec(dtype_name(value.dtype), list(value.shape)) for name, value in tensors.items()}


def schema_mismatch(tensors: dict[str, Tensor], specs: dict[str, TensorSpec]) -> str | None:
    """Describe the first difference between a sample's tensors and the specs of `dataset.json`; None if there is none.

    Conditions may differ in length from sample to sample.
    """
    count = list(tensors["timestep"].shape[:1]) if "timestep" in tensors else []
    for name, spec in specs.items():
        if name not in tensors:
            return f"no {name}"
        found, shape = tensors[name], list(spec.shape)
        if is_per_record(name):
            shape = count + shape
        elif shape and found.ndim:
            shape[0] = found.shape[0]
        if (dtype_name(found.dtype), list(found.shape)) != (spec.dtype, shape) or 0 in count:
            return f"{name} {dtype_name(found.dtype)} {list(found.shape)}, not {spec.dtype} {shape}"
    return None


def is_per_record(name: str) -> bool:
    """Return whether a tensor of a sample has an entry for each record."""
    return name in PER_RECORD or name.startswith(STEP)


def dtype_name(dtype: torch.dtype) -> str:
    """Return `"float16"` for `torch.float16`: the name in configurations and JSON files."""
    return str(dtype).removeprefix("torch.")
