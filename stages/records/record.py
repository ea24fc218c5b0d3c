"""What one trajectory leaves behind: its records, and how they become the members of a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

CONDITION_PREFIX = "cond."


@dataclass(frozen=True)
class Trajectory:
    """The records of one guided sampling run, or of a part of one.

    Attributes:
        index: place in the plan.
        part: number of this part; a long trajectory is stored in several.
        seed: of its initial noise.
        guidance_scale: `w` in `u + w (c - u)` (diffusers' convention: 1 is no guidance).
        condition: what was asked for, e.g. `{"class_label": 7}`.
        latent: `[k, ...]`, what the denoiser was given in each of k steps, after the scheduler scaled it.
        timestep: `[k]`, as the denoiser was given it.
        target: `[k, ...]`, the guided prediction that the scheduler was handed, in the model's prediction type.
        cond: every other tensor that the conditional pass was given, by the denoiser's own argument names.
    """

    index: int
    seed: int
    guidance_scale: float
    condition: dict[str, Any]
    latent: Tensor
    timestep: Tensor
    target: Tensor
    cond: dict[str, Tensor]
    part: int = 0

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def key(self) -> str:
        """The sample's name in its shard: digits and `_` only, because a dot would end a WebDataset key."""
        return f"{self.index:09d}_{self.part:04d}"

    def parts(self, size: int) -> Iterator[Trajectory]:
        """The same records in samples of at most `size`."""
        for part, start in enumerate(range(0, len(self), size)):
            chosen = slice(start, start + size)
            yield replace(
                self, part=part, latent=self.latent[chosen], timestep=self.timestep[chosen], target=self.target[chosen]
            )

    def to_members(self) -> dict[str, bytes]:
        """The members of its sample by suffix: the tensors, and what is told of them."""
        tensors = {"latent": self.latent, "timestep": self.timestep, "target": self.target}
        tensors |= {CONDITION_PREFIX + name: value for name, value in self.cond.items()}
        about = {
            "trajectory": self.index,
            "part": self.part,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "condition": self.condition,
        }
        return {
            "json": json.dumps(about, sort_keys=True).encode(),
            "safetensors": safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}),
        }


def from_members(tensors: bytes, about: bytes) -> Trajectory:
    """The inverse of `Trajectory.to_members`.

    Raises:
        ValueError: the bytes are not those of a sample.
    """
    try:
        told = json.loads(about)
        named = safetensors.torch.load(tensors)
        return Trajectory(
            index=told["trajectory"],
            part=told["part"],
            seed=told["seed"],
            guidance_scale=told["guidance_scale"],
            condition=told["condition"],
            latent=named.pop("latent"),
            timestep=named.pop("timestep"),
            target=named.pop("target"),
            cond={name.removeprefix(CONDITION_PREFIX): value for name, value in named.items()},
        )
    except (KeyError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise ValueError(f"not a sample of records: {error}") from error


def decode(sample: dict[str, Any]) -> Trajectory:
    """The decoder for a stock reader: `webdataset.WebDataset(shards).map(decode)`."""
    return from_members(sample["safetensors"], sample["json"])


def describe(trajectory: Trajectory) -> dict[str, dict[str, Any]]:
    """Dtype and shape of one record's tensors by name, as `dataset.json` tells them."""
    per_record = {"latent": trajectory.latent[0], "timestep": trajectory.timestep[0], "target": trajectory.target[0]}
    per_record |= {CONDITION_PREFIX + name: value for name, value in trajectory.cond.items()}
    return {name: {"dtype": dtype_name(value.dtype), "shape": list(value.shape)} for name, value in per_record.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`"float16"` for `torch.float16`: how configurations and JSON files name a dtype."""
    return str(dtype).removeprefix("torch.")
