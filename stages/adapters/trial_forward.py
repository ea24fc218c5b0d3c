"""A trial forward: which modules of a denoiser run, which see the image, and where each sample's rows lie in what they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.inputs import Inputs, entries_of, is_mask, places_of, timestep_name
from stages.adapters.sites import is_layer, width_axis
from stages.base.arguments import Axis, argument
from stages.base.denoiser import flatten, latent_name, unflatten
from stages.base.loading import first_line
from stages.errors import UserError

TIMESTEPS = (500.0, 300.0)  # of the scheduler, in a trial of made-up inputs, and where a sample is changed


@dataclass(frozen=True)
class Spot:
    """Where an adapter finds the image's tokens at a site.

    Attributes:
        argument: which of the module's arguments they are.
        output: which of its outputs, where it gives several.
        tiled: whether rows of the samples take turns, `[0, 1, 0, 1]`; else those of a sample lie side by side, `[0, 0, 1, 1]`.
        across: whether the samples are in the second dimension, and in the first are the tokens.
    """

    argument: int = 0
    output: int = 0
    tiled: bool = False
    across: bool = False


USUAL = Spot()


@dataclass
class Seen:
    """One module in a trial forward.

    Attributes:
        sees_image: whether what it is given depends on the latent.
        crosses: whether it is given tokens of two kinds.
        spot: None where the scales of a batch could not be told apart.
    """

    sees_image: bool
    crosses: bool
    spot: Spot | None

    def spec(self) -> dict[str, Any]:
        """Of its spot what differs from the usual, for the adapter's folder."""
        return {name: value for name, value in asdict(self.spot or USUAL).items() if value != getattr(USUAL, name)}


@dataclass
class Given:
    """A tensor that a module was given.

    Attributes:
        shape: its; sees_image: whether it depends on the latent.
        fingerprints: of each row, and of each place in the second dimension, `[size, 2]`; none without values.
    """

    shape: tuple[int, ...]
    sees_image: bool
    fingerprints: tuple[Tensor, ...] = ()


@dataclass
class Call:
    """One call of a module: tensors by their place among the arguments, and the shapes of its outputs."""

    given: dict[int, Given]
    gave: list[tuple[int, ...]]


Calls = dict[str, list[Call]]


def look(
    denoiser: nn.Module, widths: dict[str, list[int]], inputs: Inputs, metadata: dict[str, Any]
) -> dict[str, Seen]:
    """What a trial forward shows of modules, of those that run.

    The denoiser runs on the meta device, with a gradient asked for the latent alone: what asks for none does not see the image.
    Where it does not run there, or where modules are given several rows for each sample, it runs itself, on small batches of which one
    sample is changed at a time.

    Args:
        widths: of the modules by name, what they take and give.
        inputs: arguments of one call for at least two samples; those on the meta device are made up.
        metadata: what the adapter's folder tells: what the denoiser calls its timestep, and how it counts.

    Raises:
        UserError: the denoiser does not run.
    """
    inputs = flatten(unflatten(inputs)) | {name: None for name, value in inputs.items() if value is None}
    latent, timestep = latent_name(denoiser), inputs.get(timestep_name(metadata))
    places = places_of(inputs, latent, metadata)
    samples = places[latent].of_samples(argument(inputs, latent, places[latent]))
    if isinstance(timestep, Tensor) and timestep.shape == (samples,):
        places = {timestep_name(metadata): Axis()} | places
    is_real = not any(parameter.is_meta for parameter in denoiser.parameters())
    try:
        runs = [calls_on_meta(denoiser, widths, inputs)]
        is_known = not any(folds(calls, samples) for calls in runs[0].values())
    except Exception as error:  # whatever a denoiser's own code raises
        if not is_real:
            raise does_not_run(denoiser, error) from error
        is_known = False
    if not is_known and is_real:
        try:
            runs = calls_by_values(denoiser, widths, inputs, places, samples, metadata)
        except Exception as error:
            raise does_not_run(denoiser, error) from error
    streams: dict[type[nn.Module], int] = {}
    return {
        name: seen_of(denoiser.get_submodule(name), widths[name], [run.get(name, []) for run in runs], samples, streams)
        for name in runs[0]
    }


def does_not_run(denoiser: nn.Module, error: Exception) -> UserError:
    return UserError(
        f"adapter.sites: {type(denoiser).__name__} does not run in a trial, so that no layer can be looked at: "
        f"{first_line(error)}"
    )


def folds(calls: list[Call], samples: int) -> bool:
    """Whether a module is given several rows for each sample, or the samples elsewhere: values tell more than shapes."""
    shapes = {given.shape for call in calls for given in call.given.values()}
    return any(
        shape[0] != samples and (shape[0] % samples == 0 or (len(shape) > 2 and shape[1] == samples))
        for shape in shapes
    )


# Running


def calls_on_meta(denoiser: nn.Module, widths: dict[str, list[int]], inputs: Inputs) -> Calls:
    """A copy of the denoiser on the meta device; a gradient tells what sees the image."""
    model: Any = denoiser
    with torch.device("meta"):
        copy = type(model).from_config(dict(model.config))
    copy.eval().requires_grad_(False)
    given = tree_map(to_meta, unflatten(inputs))
    latent = latent_name(denoiser)
    # No leaf, because some denoisers change their latent in place.
    given[latent] = tree_map(lambda value: value.requires_grad_() * 1, given[latent])
    with torch.enable_grad():
        return watched(copy, widths, given, lambda value: Given(tuple(value.shape), value.requires_grad))


@torch.no_grad()
def calls_by_values(
    denoiser: nn.Module,
    widths: dict[str, list[int]],
    inputs: Inputs,
    places: dict[str, Axis],
    samples: int,
    metadata: dict[str, Any],
) -> list[Calls]:
    """Four runs: as given, with other latents, with another first sample, and with another last one."""
    latent, like = latent_name(denoiser), next(denoiser.parameters())
    scale, offset = metadata.get("timestep_scale", 1.0), metadata.get("timestep_offset", 0.0)
    maker = Maker(like, timestep_name(metadata), lambda timestep: scale * timestep + offset)
    one, other = maker.made(inputs), maker.changed(inputs)
    of_latent = {name: value for name, value in other.items() if name == latent or name.startswith(f"{latent}.[")}
    variants = [one, one | of_latent, *(exchanged(one, other, i, places) for i in (0, samples - 1))]

    def describe_value(value: Tensor) -> Given:
        return Given(tuple(value.shape), False, tuple(fingerprint_along(value, dim) for dim in (0, 1)))

    half = like.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(like.device.type, like.dtype) if half else nullcontext():
        return [watched(denoiser, widths, unflatten(given), describe_value) for given in variants]


def fingerprint_along(value: Tensor, dim: int) -> Tensor:
    """`[size, 2]` of each part of a tensor along a dimension."""
    parts = value.detach().movedim(dim, 0).flatten(1).float()
    return torch.stack([parts.sum(1), parts.square().sum(1)], 1).nan_to_num()


def watched(
    model: nn.Module, widths: dict[str, list[int]], given: dict[str, Any], describe_value: Callable[[Tensor], Given]
) -> Calls:
    """The calls of modules in one forward pass."""
    calls: Calls = {}
    with hooked(model, widths, calls, describe_value):
        model(**given)
    return calls


@contextmanager
def hooked(
    model: nn.Module, widths: dict[str, list[int]], calls: Calls, describe_value: Callable[[Tensor], Given]
) -> Iterator[None]:
    def watch(name: str, module: nn.Module) -> Any:
        names = parameters_of(module)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            bound = dict(enumerate(args)) | {names.index(key): v for key, v in kwargs.items() if key in names}
            given = {i: describe_value(v) for i, v in sorted(bound.items()) if is_tokens(v)}
            outputs = output if isinstance(output, (tuple, list)) else [output]
            gave = [tuple(each.shape) if isinstance(each, Tensor) else () for each in outputs]
            calls.setdefault(name, []).append(Call(given, gave))

        return see

    named = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    handles = [
        named[name].register_forward_hook(watch(name, named[name]), with_kwargs=True)
        for name in widths
        if name in named
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def argument_in(module: nn.Module) -> Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]:
    """Finds an argument of a module's call by its place, however it is given."""
    names = parameters_of(module)

    def find(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place < len(args) else kwargs[names[place]]

    return find


def parameters_of(module: nn.Module) -> list[str]:
    """The names of a module's arguments, in their order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


# Inputs


def tree_map(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Arguments of any nesting, with their tensors changed."""
    if isinstance(value, dict):
        return {name: tree_map(change, each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tree_map(change, each) for each in value)
    return change(value) if isinstance(value, Tensor) else value


def to_meta(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta", dtype=torch.float32 if value.is_floating_point() else value.dtype)


@dataclass
class Maker:
    """Makes inputs up where only their shapes are known: beside a parameter of the denoiser, in its precision."""

    like: Tensor
    timestep: str
    counted: Callable[[float], float]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def made(self, inputs: Inputs) -> Inputs:
        return {name: tree_map(partial(self._made, name), value) for name, value in inputs.items()}

    def changed(self, inputs: Inputs) -> Inputs:
        """Other values for every sample."""
        return {name: tree_map(partial(self._changed, name), value) for name, value in inputs.items()}

    def _made(self, name: str, value: Tensor) -> Tensor:
        if not value.is_meta:
            plain = value.is_floating_point() and name != self.timestep
            return value.to(self.like.device, self.like.dtype if plain else value.dtype)
        if name == self.timestep:
            return torch.full_like(value, self.counted(TIMESTEPS[0]), device=self.like.device)
        if is_mask(name, value) or not value.is_floating_point():  # of a class or a token, the first
            return torch.full_like(value, float(is_mask(name, value)), device=self.like.device)
        return self._drawn(value)

    def _changed(self, name: str, value: Tensor) -> Tensor:
        if name == self.timestep:
            return torch.full_like(value, self.counted(TIMESTEPS[1]), device=self.like.device)
        if is_mask(name, value) or not value.is_floating_point():
            return self._made(name, value)
        return self._drawn(value)

    def _drawn(self, value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=self.generator).to(self.like.device, self.like.dtype)


def exchanged(one: Inputs, other: Inputs, sample: int, places: dict[str, Axis]) -> Inputs:
    """Arguments, flat, with everything of one sample taken from others."""
    changed = dict(one)
    for name, place in places.items():
        if place.listed:
            changed |= {key: other[key] for key in entries_of(one, name, sample)}
        elif name in one and not place.shared:
            rows = range(sample * place.rows, (sample + 1) * place.rows)
            index = torch.tensor(rows, device=one[name].device)
            changed[name] = one[name].index_copy(place.dim, index, other[name].index_select(place.dim, index))
    return changed


# What was seen


def seen_of(
    module: nn.Module, widths: list[int], runs: list[list[Call]], samples: int, streams: dict[type[nn.Module], int]
) -> Seen:
    """What is known of a module from its calls in one run without values, or in four.

    Args:
        streams: which argument the image is, of the classes of modules that were seen before; the module's is added.
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
        return Seen(sees_image, crosses, None)
    (argument,) = arguments
    assert argument is not None
    orders = {order_of(runs, i, argument, samples) for i in range(len(calls))} - {EACH}
    outputs = {0} if is_a_layer else {output_of(call, argument, widths) for call in calls}
    if len(orders) > 1 or UNKNOWN in orders or len(outputs) > 1 or None in outputs:
        return Seen(sees_image, crosses, None)
    return Seen(sees_image, crosses, Spot(argument, next(iter(outputs)) or 0, TILED in orders, ACROSS in orders))


def note_stream(module: nn.Module, calls: list[Call], width: int, streams: dict[type[nn.Module], int]) -> None:
    """Keep which argument the image is, where one alone sees it: after a few blocks of two streams both do."""
    for call in calls:
        fitting = fitting_in(call, width)
        seeing = [place for place in fitting if call.given[place].sees_image]
        if len(seeing) == 1 < len(fitting):
            streams.setdefault(type(module), seeing[0])


def argument_of(call: Call, widths: list[int], is_a_layer: bool, stream: int | None) -> int | None:
    """Which argument the tokens are, of those that come out again: the image's stream, else the first that sees the image."""
    if is_a_layer:
        return next(iter(call.given), None)
    fitting = [place for place in fitting_in(call, widths[0]) if output_of(call, place, widths) is not None]
    seeing = [place for place in fitting if call.given[place].sees_image]
    return stream if stream in fitting else next(iter([*seeing, *fitting]), None)


def fitting_in(call: Call, width: int) -> list[int]:
    """The arguments that are tokens of a width."""
    shapes = {place: given.shape for place, given in call.given.items()}
    return [place for place, shape in shapes.items() if len(shape) > 2 and width_axis(shape, width) is not None]


def output_of(call: Call, argument: int, widths: list[int]) -> int | None:
    """Which output the image's tokens are: one of as many tokens; of several such, the one in the argument's turn."""
    tokens = call.given[argument].shape
    axis = width_axis(tokens, widths[0])
    assert axis is not None
    expected = list(tokens)
    expected[axis] = widths[1]
    alike = [i for i, shape in enumerate(call.gave) if list(shape) == expected]
    turn = fitting_in(call, widths[0]).index(argument)
    return alike[turn] if turn < len(alike) else next(iter(alike), None)


EACH, SIDE_BY_SIDE, TILED, ACROSS, UNKNOWN = "each", "side by side", "tiled", "across", "unknown"


def order_of(runs: list[list[Call]], call: int, argument: int, samples: int) -> str:
    """How the samples lie in what a module is given: a row for each, several side by side or by turns, or otherwise."""
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
    """Which parts along a dimension of what a module is given differ between two runs; all where these differ in shape."""
    one = runs[0][call].given[argument]
    other = runs[1][call].given.get(argument) if call < len(runs[1]) else None
    if other is None or other.shape != one.shape:
        return torch.ones(one.shape[dim], dtype=torch.bool)
    return (one.fingerprints[dim] != other.fingerprints[dim]).any(1)
