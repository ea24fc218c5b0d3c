"""A batch of records, and how samples of several lengths become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Some records.

    Attributes:
        latent, target: `[n, ...]`.
        timestep, scale: `[n]`.
        cond: `[n, ...]`, by the denoiser's argument names.
        numbers: `[n]` float32, what else a record tells of its guidance, by name; empty for datasets older than it.
    """

    latent: Tensor
    timestep: Tensor
    target: Tensor
    scale: Tensor
    cond: dict[str, Tensor]
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, chosen: Tensor) -> Batch:
        return self._each(lambda value: gather(value, chosen))

    def pin(self) -> Batch:
        """In page-locked memory, from which a GPU copies without the CPU waiting for it."""
        return self._each(Tensor.pin_memory)

    def to(self, device: str, dtype: torch.dtype) -> Batch:
        """On the device, floating-point tensors but target, scale and numbers in the given dtype."""
        return Batch(
            self.latent.to(device, dtype, non_blocking=True),
            self.timestep.to(device, non_blocking=True),
            self.target.to(device, torch.float32, non_blocking=True),
            self.scale.to(device, non_blocking=True),
            {
                name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
                for name, value in self.cond.items()
            },
            {name: value.to(device, non_blocking=True) for name, value in self.numbers.items()},
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.latent),
            change(self.timestep),
            change(self.target),
            change(self.scale),
            {name: change(value) for name, value in self.cond.items()},
            {name: change(value) for name, value in self.numbers.items()},
        )


def as_bytes(values: Tensor) -> np.ndarray:
    """The same memory as bytes `[n, ...]`, because numpy knows no bfloat16."""
    return values[:, None].flatten(1).view(torch.uint8).numpy()


def gather(values: Tensor, chosen: Tensor) -> Tensor:
    """`values[chosen]`, copied by this thread alone: torch's threads wait for each other where a core is busy."""
    taken = torch.from_numpy(np.take(as_bytes(values), chosen.numpy(), axis=0).ravel())
    return taken.view(values.dtype).view(len(chosen), *values.shape[1:])


def concatenate(parts: list[Batch]) -> Batch:
    """One batch; token embeddings of several lengths are padded, as `collate` does."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Batch(
        torch.cat([part.latent for part in parts]),
        torch.cat([part.timestep for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.scale for part in parts]),
        {name: torch.cat(padded([part.cond[name] for part in parts], 1)) for name in first.cond},
        {name: torch.cat([part.numbers[name] for part in parts]) for name in first.numbers},
    )


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The conditions of several samples, by name `[n, ...]`; shorter embeddings and their masks are padded with zeros.

    Raises:
        UserError: embeddings differ in length and have no mask to tell the padding by.
    """
    collated = {}
    for name in rows[0] if rows else {}:
        values = [row[name] for row in rows]
        if len({value.shape for value in values}) > 1 and values[0].ndim == 2 and f"{name}_mask" not in rows[0]:
            raise UserError(
                f"cond.{name} differs in length from sample to sample and has no mask: such data cannot be mixed"
            )
        collated[name] = torch.stack(padded(values, 0))
    return collated


def padded(values: list[Tensor], dim: int) -> list[Tensor]:
    """Tensors that differ in one dimension, filled up with zeros there to the longest."""
    if len({value.shape[dim:] for value in values}) == 1:
        return values
    longest = max(value.shape[dim] for value in values)
    return [
        functional.pad(value, [0, 0] * (value.ndim - dim - 1) + [0, longest - value.shape[dim]]) for value in values
    ]
