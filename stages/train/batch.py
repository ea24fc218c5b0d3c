"""A batch of records, and how samples of several lengths become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.base.arguments import LENGTH


@dataclass(frozen=True)
class Batch:
    """Some records.

    Attributes:
        latent, target: `[n, ...]`.
        timestep, scale: `[n]`.
        cond: `[n, ...]`, by the denoiser's argument names.
        guidance_stats: `[n]` float32, what else a record tells of its guidance, by name.
    """

    latent: Tensor
    timestep: Tensor
    target: Tensor
    scale: Tensor
    cond: dict[str, Tensor]
    guidance_stats: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, chosen: Tensor) -> Batch:
        return self._each(lambda value: gather(value, chosen))

    def on(self, chosen: Tensor) -> Batch:
        """As `take`, on the batch's own device."""
        return self._each(lambda value: value[chosen])

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
            {name: value.to(device, non_blocking=True) for name, value in self.guidance_stats.items()},
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.latent),
            change(self.timestep),
            change(self.target),
            change(self.scale),
            {name: change(value) for name, value in self.cond.items()},
            {name: change(value) for name, value in self.guidance_stats.items()},
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
        joined([part.cond for part in parts]),
        {name: torch.cat([part.guidance_stats[name] for part in parts]) for name in first.guidance_stats},
    )


def joined(conds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The conditions of several batches as one."""
    names = [name for name in conds[0] if not name.endswith(LENGTH)]
    whole = {name: torch.cat(padded([cond[name] for cond in conds], 1)) for name in names}
    for name in names:
        ragged = len({cond[name].shape[1:] for cond in conds}) > 1 or any(name + LENGTH in cond for cond in conds)
        if ragged and not has_mask(name, max(conds, key=lambda cond: cond[name].shape[1:2]), 1):
            whole[name + LENGTH] = torch.cat([lengths(name, cond) for cond in conds])
    return whole


def lengths(name: str, cond: dict[str, Tensor]) -> Tensor:
    """How long each sample's own tokens are `[n]`."""
    n, length = cond[name].shape[:2]
    return cond.get(name + LENGTH, torch.full((n,), length))


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The conditions of several samples, by name `[n, ...]`; shorter embeddings and their masks are padded with zeros.

    Beside embeddings that differ in length, and have no mask to tell the padding by, are their lengths, `NAME_length` `[n]`.
    """
    collated = {}
    for name in rows[0] if rows else {}:
        values = [row[name] for row in rows]
        collated[name] = torch.stack(padded(values, 0))
        longest = max(rows, key=lambda row: row[name].shape[:1])  # on few tokens, positions look like a mask
        if len({value.shape for value in values}) > 1 and not has_mask(name, longest, 0):
            collated[name + LENGTH] = torch.tensor([len(value) for value in values])
    return collated


def has_mask(name: str, cond: dict[str, Tensor], dim: int) -> bool:
    """Whether a condition masks another one, or is the mask: it has the same length, and no more than that."""
    shape = cond[name].shape[: dim + 1]
    return any(other.shape == shape and is_mask(other) for key, other in cond.items() if not key.endswith(LENGTH))


def is_mask(value: Tensor) -> bool:
    """Whether a tensor says of each token whether it counts."""
    return value.dtype == torch.bool or (not value.is_floating_point() and bool((value.ge(0) & value.le(1)).all()))


def of_one_length(batch: Batch) -> list[tuple[Tensor, Batch]]:
    """The records of a batch `[k]` with equal lengths of every condition, and they as a batch without padding."""
    named = {name.removesuffix(LENGTH): value for name, value in batch.cond.items() if name.endswith(LENGTH)}
    table = torch.stack(list(named.values()), 1)
    parts = []
    for row in table.unique(dim=0):
        chosen = (table == row).all(1).nonzero().flatten()
        cond = {name: value[chosen] for name, value in batch.cond.items() if not name.endswith(LENGTH)}
        cond |= {name: cond[name][:, :length] for name, length in zip(named, row.tolist(), strict=True)}
        parts.append((chosen, replace(batch.on(chosen), cond=cond)))
    return parts


def padded(values: list[Tensor], dim: int) -> list[Tensor]:
    """Tensors that differ in one dimension, filled up with zeros there to the longest."""
    if len({value.shape[dim:] for value in values}) == 1:
        return values
    longest = max(value.shape[dim] for value in values)
    return [
        functional.pad(value, [0, 0] * (value.ndim - dim - 1) + [0, longest - value.shape[dim]]) for value in values
    ]
