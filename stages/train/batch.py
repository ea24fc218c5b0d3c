"""A batch of records, and the padding that collates samples of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.base.arguments import LENGTH
from stages.base.size import DEFAULT_SIZE


@dataclass(frozen=True)
class Batch:
    """A batch of n records of one size.

    Attributes:
        latent, target: `[n, ...]`.
        timestep, scale: `[n]`.
        cond: `[n, ...]`, by the names of the denoiser's arguments.
        guidance_stats: `[n]` float32, the other numbers that a record holds about its guidance, by name.
        size: its name, as `size_name` gives it.
    """

    latent: Tensor
    timestep: Tensor
    target: Tensor
    scale: Tensor
    cond: dict[str, Tensor]
    guidance_stats: dict[str, Tensor] = field(default_factory=dict)
    size: str = DEFAULT_SIZE

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, chosen: Tensor) -> Batch:
        return self._each(lambda value: gather(value, chosen))

    def on(self, chosen: Tensor) -> Batch:
        """Like `take`, but indexed on the batch's device."""
        return self._each(lambda value: value[chosen])

    def pin(self) -> Batch:
        """Copy the batch to page-locked memory, from which a GPU copies asynchronously."""
        return self._each(Tensor.pin_memory)

    def to(self, device: str, dtype: torch.dtype) -> Batch:
        """Move the batch to a device; floating-point tensors except target, scale and guidance_stats take the dtype."""
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
            self.size,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.latent),
            change(self.timestep),
            change(self.target),
            change(self.scale),
            {name: change(value) for name, value in self.cond.items()},
            {name: change(value) for name, value in self.guidance_stats.items()},
            self.size,
        )


def as_bytes(values: Tensor) -> np.ndarray:
    """View the same memory as bytes `[n, ...]`, because numpy has no bfloat16."""
    return values[:, None].flatten(1).view(torch.uint8).numpy()


def gather(values: Tensor, chosen: Tensor) -> Tensor:
    """Return `values[chosen]`, copied by this thread only: torch's thread pool stalls when a core is busy."""
    taken = torch.from_numpy(np.take(as_bytes(values), chosen.numpy(), axis=0).ravel())
    return taken.view(values.dtype).view(len(chosen), *values.shape[1:])


def concatenate(parts: list[Batch]) -> Batch:
    """Concatenate batches of one size; token embeddings of different lengths are padded as in `collate`."""
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
        first.size,
    )


def joined(conds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the conditions of several batches."""
    names = [name for name in conds[0] if not name.endswith(LENGTH)]
    whole = {name: torch.cat(padded([cond[name] for cond in conds], 1)) for name in names}
    for name in names:
        ragged = len({cond[name].shape[1:] for cond in conds}) > 1 or any(name + LENGTH in cond for cond in conds)
        if ragged and not has_mask(name, max(conds, key=lambda cond: cond[name].shape[1:2]), 1):
            whole[name + LENGTH] = torch.cat([lengths(name, cond) for cond in conds])
    return whole


def lengths(name: str, cond: dict[str, Tensor]) -> Tensor:
    """The number of unpadded tokens of each sample `[n]`."""
    n, length = cond[name].shape[:2]
    return cond.get(name + LENGTH, torch.full((n,), length))


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the conditions of several samples, by name `[n, ...]`; pad shorter embeddings and their masks with zeros.

    Embeddings that differ in length and have no mask get an entry `NAME_length` `[n]` with their lengths.
    """
    collated = {}
    for name in rows[0] if rows else {}:
        values = [row[name] for row in rows]
        collated[name] = torch.stack(padded(values, 0))
        longest = max(rows, key=lambda row: row[name].shape[:1])  # positions of only two tokens look like a mask
        if len({value.shape for value in values}) > 1 and not has_mask(name, longest, 0):
            collated[name + LENGTH] = torch.tensor([len(value) for value in values])
    return collated


def has_mask(name: str, cond: dict[str, Tensor], dim: int) -> bool:
    """Whether a condition is a mask or has one: a tensor of the same leading shape and no further dimensions."""
    shape = cond[name].shape[: dim + 1]
    return any(other.shape == shape and is_mask(other) for key, other in cond.items() if not key.endswith(LENGTH))


def is_mask(value: Tensor) -> bool:
    """Whether a tensor is a token mask: booleans, or integers that are all 0 or 1."""
    return value.dtype == torch.bool or (not value.is_floating_point() and bool((value.ge(0) & value.le(1)).all()))


def split_by_length(batch: Batch) -> list[tuple[Tensor, Batch]]:
    """Split a batch by the lengths of its conditions: indices `[k]` of records, and these records without padding."""
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
    """Pad tensors that differ in one dimension with zeros to the longest."""
    if len({value.shape[dim:] for value in values}) == 1:
        return values
    longest = max(value.shape[dim] for value in values)
    return [
        functional.pad(value, [0, 0] * (value.ndim - dim - 1) + [0, longest - value.shape[dim]]) for value in values
    ]
