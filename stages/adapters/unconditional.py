"""What a pipeline would give its denoiser for the negative prompt, found without running the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from stages.denoiser import bind_inputs, denoiser_of, latent_name, negative_tokens
from stages.errors import UserError


class StoppedError(Exception):
    """The pipeline got as far as it was wanted to."""


class StandIn:
    """In the denoiser's place during a guided step: answers with zeros until the unconditional call, and keeps that one.

    Attributes:
        inputs: of the unconditional call, flat.
    """

    def __init__(self, denoiser: Any, call: int) -> None:
        self.denoiser, self.calls_left = denoiser, call
        self.inputs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        inputs = bind_inputs(self.denoiser, args, kwargs)
        if not self.calls_left:
            self.inputs = inputs
            raise StoppedError
        self.calls_left -= 1
        return Transformer2DModelOutput(torch.zeros_like(next(iter(inputs.values()))))


def unconditional_tokens(
    pipe: Any, call: Callable[[], Any], place: dict[str, int], generators: Any
) -> dict[str, Tensor]:
    """Token embeddings and masks of a guided call's unconditional pass, named `negative.NAME`, each `[n, ...]`.

    The pipeline prepares the call as it always does, so that prompts are encoded by its own rules, and is stopped at its first step.

    Args:
        call: a guided call of the pipeline; place: its call, chunk and number of chunks (`dataset.json`'s layout).
        generators: those of the call, one, several or none: they come back as they were.

    Raises:
        UserError: the call makes no unconditional pass.
    """
    name, denoiser = denoiser_of(pipe)
    with (
        restored(generators),
        replaced(pipe, name, StandIn(denoiser, place["call"])) as stand_in,
        suppress(StoppedError),
    ):
        call()
    latent = latent_name(denoiser)
    rows = len(stand_in.inputs[latent]) if stand_in.inputs else 0
    if not rows:
        raise UserError(
            f"{type(pipe).__name__} makes no unconditional pass in this call, and the adapter sees its tokens: give a negative_prompt"
        )
    size = rows // place["chunks"]
    return negative_tokens(stand_in.inputs, latent, slice(place["chunk"] * size, (place["chunk"] + 1) * size))


@contextmanager
def replaced(pipe: Any, name: str, stand_in: StandIn) -> Iterator[StandIn]:
    """Within it, a pipeline has another part; its configuration does not hear of it, nor does its user's progress bar."""
    before, bar = vars(pipe)[name], getattr(pipe, "_progress_bar_config", {})
    vars(pipe)[name] = stand_in
    pipe.set_progress_bar_config(**bar | {"disable": True})
    try:
        yield stand_in
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
