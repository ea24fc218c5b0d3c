"""What a pipeline would give its denoiser for the negative prompt, found without running the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from stages.adapters.wrappers import unwrapped
from stages.base.denoiser import bind_inputs, latent_name, negative_tokens
from stages.errors import UserError


class StoppedError(Exception):
    """The pipeline got as far as it was wanted to."""


class GuidedStep:
    """A guided step under way, whichever denoiser it calls.

    Attributes:
        calls_left: before the unconditional one; inputs: of that one, flat.
    """

    def __init__(self, calls_left: int) -> None:
        self.calls_left = calls_left
        self.inputs: dict[str, Any] = {}


class StandIn:
    """In a denoiser's place during a guided step: answers with zeros until the unconditional call, and keeps that one."""

    def __init__(self, denoiser: Any, step: GuidedStep) -> None:
        self.denoiser, self.step = denoiser, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        inputs = bind_inputs(self.denoiser, args, kwargs)
        if not self.step.calls_left:
            self.step.inputs = inputs
            raise StoppedError
        self.step.calls_left -= 1
        return Transformer2DModelOutput(torch.zeros_like(next(iter(inputs.values()))))


def unconditional_tokens(
    pipe: Any, names: Sequence[str], call: Callable[[], Any], place: dict[str, int], generators: Any
) -> dict[str, Tensor]:
    """Token embeddings and masks of a guided call's unconditional pass, named `negative.NAME`, each `[n, ...]`.

    The pipeline prepares the call as it always does, so that prompts are encoded by its own rules, and is stopped at its first step.

    Args:
        names: of its denoisers; call: a guided call of the pipeline; place: its call, chunk and number of chunks (`dataset.json`'s layout).
        generators: those of the call, one, several or none: they come back as they were.

    Raises:
        UserError: the call makes no unconditional pass.
    """
    step, denoisers = GuidedStep(place["call"]), {name: unwrapped(getattr(pipe, name)) for name in names}
    with ExitStack() as stack:
        stack.enter_context(restored(generators))
        for name, denoiser in denoisers.items():
            stack.enter_context(replaced(pipe, name, StandIn(denoiser, step)))
        stack.enter_context(suppress(StoppedError))
        call()
    latent = latent_name(next(iter(denoisers.values())))
    rows = len(step.inputs[latent]) if step.inputs else 0
    if not rows:
        raise UserError(
            f"{type(pipe).__name__} makes no unconditional pass in this call, and the adapter sees its tokens: give a negative_prompt"
        )
    size = rows // place["chunks"]
    return negative_tokens(step.inputs, latent, slice(place["chunk"] * size, (place["chunk"] + 1) * size))


@contextmanager
def replaced(pipe: Any, name: str, stand_in: StandIn) -> Iterator[None]:
    """Within it, a pipeline has another part; its configuration does not hear of it, nor does its user's progress bar."""
    before, bar = vars(pipe)[name], getattr(pipe, "_progress_bar_config", {})
    vars(pipe)[name] = stand_in
    pipe.set_progress_bar_config(**bar | {"disable": True})
    try:
        yield
    finally:
        vars(pipe)[name] = before
        pipe.set_progress_bar_config(**bar)


@contextmanager
def restored(generators: Any) -> Iterator[None]:
    """Afterwards the random generators, torch's own among them, are as they were."""
    given = generators if isinstance(generators, list) else [generators]
    states = [(generator, generator.get_state()) for generator in given if generator is not None]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    for generator, state in states:
        generator.set_state(state)
