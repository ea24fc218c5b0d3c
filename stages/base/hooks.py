"""Hooks on an unmodified pipeline: they watch its denoisers and its scheduler, or count what runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stages.base.denoiser import bind_inputs, denoisers_of, latent_name, predictions_of, samples_in
from stages.base.patching import patched

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        inputs: its arguments, flat, by the denoiser's own names.
        predictions: `[rows, ...]` each; mostly one.
        denoiser: its name in the pipeline.
    """

    inputs: Inputs
    predictions: tuple[Tensor, ...]
    denoiser: str

    @property
    def prediction(self) -> Tensor:
        return self.predictions[0]


@dataclass(frozen=True)
class SchedulerStep:
    """The timestep and the latents `[n, ...]` at the start of a scheduler's step."""

    timestep: Any
    latents: Tensor


@contextmanager
def watch_steps(
    pipe: Any,
    see_step: Callable[[list[Call], list[Tensor], Any], None],
    see_latents: Callable[[Tensor], None] = lambda latents: None,
    streams: int | None = 1,
) -> Iterator[None]:
    """Within the context, pass every step of a pipeline to `see_step`: denoiser calls, received predictions, timestep.

    Copies that the pipeline makes of its scheduler (for sound beside video) receive predictions of their own; these
    follow the scheduler's own. `see_latents` gets the latents that each step of the scheduler returns.

    Args:
        streams: the number of schedulers that step, the pipeline's own included; None ends a step at the scheduler's
            next.
    """
    signature = inspect.signature(type(pipe.scheduler).step)
    calls: list[Call] = []
    step_seen: list[Any] = []  # denoiser calls, received predictions, timestep

    def end_step() -> None:
        if step_seen:
            see_step(*step_seen)
            step_seen.clear()

    def watched_step(step: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        received = signature.bind(scheduler, *args, **kwargs).arguments
        if scheduler is pipe.scheduler:
            end_step()
            step_seen[:] = [list(calls), [], received["timestep"]]
            calls.clear()
        if step_seen:
            step_seen[1].append(received["model_output"].clone())
            if len(step_seen[1]) == streams:
                end_step()
        result = step(*args, **kwargs)
        if scheduler is pipe.scheduler:
            see_latents(result[0])
        return result

    with ExitStack() as stack:
        for name, denoiser in denoisers_of(pipe).items():
            stack.enter_context(_watched_denoiser(name, denoiser, calls))
        stack.enter_context(patched(pipe.scheduler, "step", watched_step, in_copies=True))
        yield
    end_step()


@contextmanager
def _watched_denoiser(name: str, denoiser: nn.Module, calls: list[Call]) -> Iterator[None]:
    given: list[Inputs] = []
    latent = latent_name(denoiser)

    def see_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = bind_inputs(module, args, kwargs)  # before the call, which may change its dictionaries
        inputs.pop("return_dict", None)
        # Some pipelines write the next latents into the tensor of the last.
        inputs |= {key: value.clone() for key, value in inputs.items() if key.partition(".")[0] == latent}
        given.append(inputs)

    def see_prediction(module: Any, args: tuple[Any, ...], output: Any) -> None:
        predictions = tuple(part.clone() for part in predictions_of(output))  # pipelines may guide in place
        calls.append(Call(given.pop(), predictions, name))

    handles = [
        denoiser.register_forward_pre_hook(see_inputs, with_kwargs=True),
        denoiser.register_forward_hook(see_prediction),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def count_evaluations(*denoisers: nn.Module) -> Iterator[list[int]]:
    """Within the context, the list's one item counts the denoisers' evaluations, one per sample that runs."""
    count = [0]

    def counting(forward: Any, denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count[0] += samples_in(denoiser, args, kwargs)
        return forward(*args, **kwargs)

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(patched(denoiser, "forward", counting))
        yield count


@contextmanager
def scheduler_steps(pipe: Any, n: int) -> Iterator[list[SchedulerStep]]:
    """Within the context, the list collects the steps that the pipeline's scheduler makes for n images.

    Of a doubled batch, the first n samples are the images. Nothing waits for the GPU.
    """
    steps: list[SchedulerStep] = []
    signature = inspect.signature(type(pipe.scheduler).step)

    def seen(step: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        received = signature.bind(scheduler, *args, **kwargs).arguments
        latents = received["sample"][:n].clone()
        result = step(*args, **kwargs)
        steps.append(SchedulerStep(received["timestep"], latents))
        return result

    with patched(pipe.scheduler, "step", seen):
        yield steps
