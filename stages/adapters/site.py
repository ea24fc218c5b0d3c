"""An adapter's module at one site, and how its output is added to the site's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from stages.adapters.conditioning import Conditions
from stages.adapters.sites import Shape, width_axis
from stages.errors import UserError


class Site(nn.Module, ABC):
    """The adapter's module at one site.

    What does not depend on the image is computed once per forward pass, in `prepare_step` and `prepare_tokens`.
    """

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """Return what depends on scale, timestep and whole conditions: tensors `[n, ...]`."""
        return ()

    def prepare_tokens(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """Return what depends on the conditions' tokens only: tensors `[n, ...]`."""
        return ()

    @abstractmethod
    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        """Return the change of the site's output, `[n, length, width]` or broadcastable to it; untrained, zero.

        Args:
            tokens: `[n, length, width]`, the site's input.
            prepared: the results of `prepare_step` and `prepare_tokens`.
        """

    def change(self, shape: Shape, tokens: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the change in the layout of the module's output; `forward` takes `[n, length, width]` only."""
        axis = width_axis(tokens.shape, shape[0])
        if tokens.ndim == 3 and axis == 2:
            return self(tokens, *prepared)
        assert axis is not None
        within = [size for i, size in enumerate(tokens.shape) if i not in (0, axis)]
        change = self(tokens.movedim(axis, -1).flatten(1, -2), *prepared)
        sizes = within if change.shape[1] != 1 else [1] * len(within)
        return change.unflatten(1, sizes).movedim(-1, axis)


def apply_gate(change: Tensor, gate: Tensor | None, tiled: bool = False) -> Tensor:
    """Zero the change `[rows, ...]` of unguided samples; the gate is `[n]`, or None if all are guided."""
    if gate is None:
        return change
    return change * expand_to_rows(gate, len(change), tiled).view(-1, *[1] * (change.ndim - 1))


def add_to_output(output: Any, change: Tensor, which: int) -> Any:
    """Add a change to a module's output, or to one of several outputs."""
    if isinstance(output, (tuple, list)):
        return type(output)(add_to_output(each, change, 0) if i == which else each for i, each in enumerate(output))
    return output + change.to(output.dtype)


def expand_to_rows(values: Tensor, rows: int, tiled: bool = False) -> Tensor:
    """Repeat values of n samples to `[rows, ...]`: a layer may get several rows for each sample.

    Args:
        tiled: whether the samples' rows alternate; else each sample's rows are adjacent.

    Raises:
        UserError: the number of rows is not a multiple of n.
    """
    samples = len(values)
    if rows == samples:
        return values
    if rows % samples:
        raise UserError(
            f"a layer gets {rows} rows for {samples} samples, so guidance cannot assign them: "
            "give the samples one by one"
        )
    count = rows // samples
    return values.repeat(count, *[1] * (values.ndim - 1)) if tiled else values.repeat_interleave(count, dim=0)
