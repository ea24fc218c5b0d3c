"""An adapter's part at one site, and how it is added to the output of the site's module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from stages.adapters.conditioning import Conditions
from stages.adapters.sites import Shape, width_axis
from stages.errors import UserError


class Site(nn.Module, ABC):
    """The adapter's part at one site.

    What does not depend on the image is prepared apart: once per forward pass, not once per token.
    """

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """What depends on scale, timestep and whole conditions: tensors `[n, ...]`."""
        return ()

    def prepare_tokens(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """What depends on the conditions' tokens alone: tensors `[n, ...]`."""
        return ()

    @abstractmethod
    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        """What is added to the site's output, `[n, length, width]` or broadcastable to it, zero at the start.

        Args:
            tokens: `[n, length, width]`, what the site was given.
            prepared: what `prepare_step` and `prepare_tokens` output_shapes.
        """

    def change(self, shape: Shape, tokens: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """What the site adds, in the layout of the module's output; `forward` knows tokens `[n, length, width]` alone."""
        axis = width_axis(tokens.shape, shape[0])
        if tokens.ndim == 3 and axis == 2:
            return self(tokens, *prepared)
        assert axis is not None
        within = [size for i, size in enumerate(tokens.shape) if i not in (0, axis)]
        change = self(tokens.movedim(axis, -1).flatten(1, -2), *prepared)
        sizes = within if change.shape[1] != 1 else [1] * len(within)
        return change.unflatten(1, sizes).movedim(-1, axis)


def apply_gate(change: Tensor, gate: Tensor | None, tiled: bool = False) -> Tensor:
    """The change `[rows, ...]` of those samples that are guided; gate `[n]`, None where all are."""
    if gate is None:
        return change
    return change * expand_to_rows(gate, len(change), tiled).view(-1, *[1] * (change.ndim - 1))


def add_to_output(output: Any, change: Tensor, which: int) -> Any:
    """A module's output, or of several that one, with a change."""
    if isinstance(output, (tuple, list)):
        return type(output)(add_to_output(each, change, 0) if i == which else each for i, each in enumerate(output))
    return output + change.to(output.dtype)


def expand_to_rows(values: Tensor, rows: int, tiled: bool = False) -> Tensor:
    """Values `[rows, ...]` from those of n samples: a layer may be given several rows for each, side by side or by turns.

    Raises:
        UserError: it is given rows that belong to no sample.
    """
    samples = len(values)
    if rows == samples:
        return values
    if rows % samples:
        raise UserError(
            f"a layer is given {rows} rows for {samples} samples, so that guidance cannot tell them apart: give the samples one by one"
        )
    count = rows // samples
    return values.repeat(count, *[1] * (values.ndim - 1)) if tiled else values.repeat_interleave(count, dim=0)
