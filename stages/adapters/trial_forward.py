"""A trial forward: runs a denoiser on made-up inputs and records the calls of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.inputs import Inputs, places_of
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.spots import Call, TensorFacts, TrialFacts, judge_module, parameters_of
from stages.adapters.trial_inputs import InputMaker, map_tensors, swap_sample, to_meta
from stages.base.arguments import Axis, argument
from stages.base.denoiser import flatten, floating_weight, latent_name, unflatten
from stages.base.loading import first_line
from stages.errors import UserError

Calls = dict[str, list[Call]]


def run_trial(
    denoiser: nn.Module, widths: dict[str, list[int]], inputs: Inputs, metadata: AdapterMetadata
) -> dict[str, TrialFacts]:
    """Run a trial forward and judge each module that runs.

    A copy runs on the meta device, and only the latent requires a gradient: tensors that require none do not depend on
    the image. If that fails, or modules get several rows for each sample, the denoiser itself runs on small batches,
    with one sample changed at a time.

    Args:
        widths: input and output width of the modules, by name.
        inputs: arguments of one call for at least two samples; values on the meta device are made up.
        metadata: names and scales the denoiser's timestep, and says where each argument has its samples.

    Raises:
        UserError: the denoiser does not run.
    """
    inputs = flatten(unflatten(inputs)) | {name: None for name, value in inputs.items() if value is None}
    latent, timestep = latent_name(denoiser), inputs.get(metadata.timestep)
    places = places_of(inputs, latent, metadata)
    samples = places[latent].of_samples(argument(inputs, latent, places[latent]))
    if isinstance(timestep, Tensor) and timestep.shape == (samples,):
        places = {metadata.timestep: Axis()} | places
    is_real = not any(parameter.is_meta for parameter in denoiser.parameters())
    try:
        runs = [calls_on_meta(denoiser, widths, inputs)]
        is_decided = not any(folds(calls, samples) for calls in runs[0].values())
    except Exception as error:  # a denoiser's code may raise anything
        if not is_real:
            raise does_not_run(denoiser, error) from error
        is_decided = False
    if not is_decided and is_real:
        try:
            runs = calls_by_values(denoiser, widths, inputs, places, samples, metadata)
        except Exception as error:
            raise does_not_run(denoiser, error) from error
    streams: dict[type[nn.Module], int] = {}
    return {
        name: judge_module(
            denoiser.get_submodule(name), widths[name], [run.get(name, []) for run in runs], samples, streams
        )
        for name in runs[0]
    }


def does_not_run(denoiser: nn.Module, error: Exception) -> UserError:
    return UserError(
        f"adapter.sites: {type(denoiser).__name__} does not run in a trial, which shows its layers: {first_line(error)}"
    )


def folds(calls: list[Call], samples: int) -> bool:
    """Whether shapes leave open where the samples are: several rows for each, or samples in the second dimension."""
    shapes = {given.shape for call in calls for given in call.given.values()}
    return any(
        shape[0] != samples and (shape[0] % samples == 0 or (len(shape) > 2 and shape[1] == samples))
        for shape in shapes
    )


# Running


def calls_on_meta(denoiser: nn.Module, widths: dict[str, list[int]], inputs: Inputs) -> Calls:
    """Run a copy of the denoiser on the meta device; gradients show what depends on the image."""
    model: Any = denoiser
    with torch.device("meta"):
        copy = type(model).from_config(dict(model.config))
    copy.eval().requires_grad_(False)
    given = map_tensors(to_meta, unflatten(inputs))
    latent = latent_name(denoiser)
    # No leaf, because some denoisers change their latent in place.
    given[latent] = map_tensors(lambda value: value.requires_grad_() * 1, given[latent])
    with torch.enable_grad():
        return observe_calls(copy, widths, given, lambda value: TensorFacts(tuple(value.shape), value.requires_grad))


@torch.no_grad()
def calls_by_values(
    denoiser: nn.Module,
    widths: dict[str, list[int]],
    inputs: Inputs,
    places: dict[str, Axis],
    samples: int,
    metadata: AdapterMetadata,
) -> list[Calls]:
    """Run four times: unchanged, with other latents, with another first sample, and with another last sample."""
    latent, like = latent_name(denoiser), floating_weight(denoiser)
    scale, offset = metadata.timestep_scale, metadata.timestep_offset
    maker = InputMaker(like, metadata.timestep, lambda timestep: scale * timestep + offset)
    one, other = maker.make(inputs), maker.make_other(inputs)
    of_latent = {name: value for name, value in other.items() if name == latent or name.startswith(f"{latent}.[")}
    variants = [one, one | of_latent, *(swap_sample(one, other, i, places) for i in (0, samples - 1))]

    def describe_value(value: Tensor) -> TensorFacts:
        return TensorFacts(tuple(value.shape), False, tuple(fingerprint_along(value, dim) for dim in (0, 1)))

    half = like.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(like.device.type, like.dtype) if half else nullcontext():
        return [observe_calls(denoiser, widths, unflatten(given), describe_value) for given in variants]


def fingerprint_along(value: Tensor, dim: int) -> Tensor:
    """Return sum and sum of squares `[size, 2]` of each part of a tensor along a dimension."""
    parts = value.detach().movedim(dim, 0).flatten(1).float()
    return torch.stack([parts.sum(1), parts.square().sum(1)], 1).nan_to_num()


def observe_calls(
    model: nn.Module,
    widths: dict[str, list[int]],
    given: dict[str, Any],
    describe_value: Callable[[Tensor], TensorFacts],
) -> Calls:
    """Return the calls of modules in one forward pass."""
    calls: Calls = {}
    with hooked(model, widths, calls, describe_value):
        model(**given)
    return calls


@contextmanager
def hooked(
    model: nn.Module, widths: dict[str, list[int]], calls: Calls, describe_value: Callable[[Tensor], TensorFacts]
) -> Iterator[None]:
    def watch(name: str, module: nn.Module) -> Any:
        names = parameters_of(module)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            bound = dict(enumerate(args)) | {names.index(key): v for key, v in kwargs.items() if key in names}
            given = {i: describe_value(v) for i, v in sorted(bound.items()) if is_tokens(v)}
            outputs = output if isinstance(output, (tuple, list)) else [output]
            output_shapes = [tuple(each.shape) if isinstance(each, Tensor) else () for each in outputs]
            calls.setdefault(name, []).append(Call(given, output_shapes))

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


def is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
