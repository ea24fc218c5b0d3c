"""Where the image's tokens are in a module's call, judged by the module's calls in a trial forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.sites import is_layer, width_axis


@dataclass(frozen=True)
class Spot:
    """Where the image's tokens are in the call of a site's module.

    Attributes:
        argument: index of the argument; output: index of the output, if there are several.
        tiled: whether the samples' rows alternate, `[0, 1, 0, 1]`; else they are adjacent, `[0, 0, 1, 1]`.
        across: whether the second dimension holds the samples, and the first the tokens.
    """

    argument: int = 0
    output: int = 0
    tiled: bool = False
    across: bool = False


DEFAULT_SPOT = Spot()


@dataclass
class TrialFacts:
    """One module in a trial forward.

    Attributes:
        sees_image: whether an argument depends on the latent.
        crosses: whether its arguments are tokens of two lengths.
        spot: None if no layout assigns each row to one sample.
    """

    sees_image: bool
    crosses: bool
    spot: Spot | None

    def spec(self) -> dict[str, Any]:
        """Return the spot's fields that differ from the default, for the adapter's folder."""
        return {
            name: value
            for name, value in asdict(self.spot or DEFAULT_SPOT).items()
            if value != getattr(DEFAULT_SPOT, name)
        }


@dataclass
class TensorFacts:
    """A tensor among a module's arguments.

    Attributes:
        sees_image: whether it depends on the latent.
        fingerprints: `[size, 2]` along the first and along the second dimension; none on the meta device.
    """

    shape: tuple[int, ...]
    sees_image: bool
    fingerprints: tuple[Tensor, ...] = ()


@dataclass
class Call:
    """One call of a module: its tensors by argument index, and the shapes of its outputs."""

    given: dict[int, TensorFacts]
    output_shapes: list[tuple[int, ...]]


def judge_module(
    module: nn.Module, widths: list[int], runs: list[list[Call]], samples: int, streams: dict[type[nn.Module], int]
) -> TrialFacts:
    """Judge a module by its calls in one run on the meta device, or in four runs with values.

    Args:
        streams: index of the image's argument by class of module; the module's class is added.
    """
    calls, is_a_layer = runs[0], is_layer(module)
    if len(runs) > 1:
        for i, call in enumerate(calls):
            for place, given in call.given.items():
                given.sees_image = bool(changes(runs[:2], i, place).any())
    if not is_a_layer:
        note_stream(module, calls, widths[0], streams)
    arguments = {argument_of(call, widths, is_a_layer, streams.get(type(module))) for call in calls}
    crosses = any(len({given.shape[1] for given in call.given.values() if len(given.shape) > 2}) > 1 for call in calls)
    sees_image = any(given.sees_image for call in calls for given in call.given.values())
    if len(arguments) != 1 or None in arguments:
        return TrialFacts(sees_image, crosses, None)
    (argument,) = arguments
    assert argument is not None
    orders = {order_of(runs, i, argument, samples) for i in range(len(calls))} - {EACH}
    outputs = {0} if is_a_layer else {output_of(call, argument, widths) for call in calls}
    if len(orders) > 1 or UNKNOWN in orders or len(outputs) > 1 or None in outputs:
        return TrialFacts(sees_image, crosses, None)
    return TrialFacts(sees_image, crosses, Spot(argument, next(iter(outputs)) or 0, TILED in orders, ACROSS in orders))


def note_stream(module: nn.Module, calls: list[Call], width: int, streams: dict[type[nn.Module], int]) -> None:
    """Note the image's argument while only one depends on the latent: after a few two-stream blocks both do."""
    for call in calls:
        fitting = fitting_in(call, width)
        seeing = [place for place in fitting if call.given[place].sees_image]
        if len(seeing) == 1 < len(fitting):
            streams.setdefault(type(module), seeing[0])


def argument_of(call: Call, widths: list[int], is_a_layer: bool, stream: int | None) -> int | None:
    """Return the index of the tokens' argument: the image's stream, else the first that depends on the latent."""
    if is_a_layer:
        return next(iter(call.given), None)
    fitting = [place for place in fitting_in(call, widths[0]) if output_of(call, place, widths) is not None]
    seeing = [place for place in fitting if call.given[place].sees_image]
    return stream if stream in fitting else next(iter([*seeing, *fitting]), None)


def fitting_in(call: Call, width: int) -> list[int]:
    """Return the indices of arguments that are tokens of a width."""
    shapes = {place: given.shape for place, given in call.given.items()}
    return [place for place, shape in shapes.items() if len(shape) > 2 and width_axis(shape, width) is not None]


def output_of(call: Call, argument: int, widths: list[int]) -> int | None:
    """Return the index of the tokens' output: of several with their shape, the one at the argument's position."""
    tokens = call.given[argument].shape
    axis = width_axis(tokens, widths[0])
    assert axis is not None
    expected = list(tokens)
    expected[axis] = widths[1]
    fitting = [i for i, shape in enumerate(call.output_shapes) if list(shape) == expected]
    position = fitting_in(call, widths[0]).index(argument)
    return fitting[position] if position < len(fitting) else next(iter(fitting), None)


EACH, SIDE_BY_SIDE, TILED, ACROSS, UNKNOWN = "each", "side by side", "tiled", "across", "unknown"


def order_of(runs: list[list[Call]], call: int, argument: int, samples: int) -> str:
    """Return how an argument holds the samples: a row for each, several adjacent or alternating rows, or otherwise."""
    shape = runs[0][call].given[argument].shape
    rows, count = torch.arange(shape[0]), max(shape[0] // samples, 1)
    if len(runs) == 1:
        return EACH if shape[0] == samples else UNKNOWN
    orders = {SIDE_BY_SIDE: (0, rows // count), TILED: (0, rows % samples)} if shape[0] % samples == 0 else {}
    if len(shape) > 2 and shape[1] == samples:
        orders[ACROSS] = 1, torch.arange(samples)
    for order, (dim, owner) in orders.items():
        parts = [changes([runs[0], run], call, argument, dim).cpu() for run in runs[2:]]
        own = [bool((owner[part] == sample).all()) for part, sample in zip(parts, (0, samples - 1), strict=True)]
        is_each = dim == 0 and count == 1
        if all(own) and (is_each or all(bool(part.any()) for part in parts)):
            return EACH if is_each else order
    return UNKNOWN


def changes(runs: list[list[Call]], call: int, argument: int, dim: int = 0) -> Tensor:
    """Return which parts of an argument along a dimension differ between two runs; all if the shapes differ."""
    one = runs[0][call].given[argument]
    other = runs[1][call].given.get(argument) if call < len(runs[1]) else None
    if other is None or other.shape != one.shape:
        return torch.ones(one.shape[dim], dtype=torch.bool)
    return (one.fingerprints[dim] != other.fingerprints[dim]).any(1)


# A module's arguments


def argument_in(module: nn.Module) -> Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]:
    """Return a function that finds a call's argument by index, whether positional or by keyword."""
    names = parameters_of(module)

    def find(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place < len(args) else kwargs[names[place]]

    return find


def parameters_of(module: nn.Module) -> list[str]:
    """Return the names of a module's arguments, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
