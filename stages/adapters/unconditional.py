"""The inputs of a pipeline's unconditional pass, found without running the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from stages.adapters.wrappers import unwrapped
from stages.base.denoiser import bind_inputs, latent_name, negative_tokens
from stages.base.patching import replaced
from stages.errors import UserError


class StoppedError(Exception):
    """Stops a pipeline at its unconditional pass."""


class GuidedStep:
    """The first step of a guided call.

    Attributes:
        calls_left: denoiser calls before the unconditional one; inputs: of the unconditional call, flat.
    """

    def __init__(self, calls_left: int) -> None:
        self.calls_left = calls_left
        self.inputs: dict[str, Any] = {}


class StandIn:
    """Replaces a denoiser during a guided step: returns zeros until the unconditional call, and keeps its inputs."""

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
    """Return token embeddings and masks of a guided call's unconditional pass, named `negative.NAME`, each `[n, ...]`.

    The pipeline prepares the call and encodes its prompts by its own rules, and is stopped at its first step.

    Args:
        names: of the pipeline's denoisers; call: makes a guided call of the pipeline.
        place: call, chunk and number of chunks of the unconditional pass (`dataset.json`'s layout).
        generators: those of the call, one, several or none; their states are restored.

    Raises:
        UserError: the call makes no unconditional pass.
    """
    step, denoisers = GuidedStep(place["call"]), {name: unwrapped(getattr(pipe, name)) for name in names}
    with ExitStack() as stack:
        stack.enter_context(restored(generators))
        bar = getattr(pipe, "_progress_bar_config", {})
        stack.enter_context(replaced(pipe, "_progress_bar_config", bar | {"disable": True}))
        for name, denoiser in denoisers.items():
            stack.enter_context(replaced(pipe, name, StandIn(denoiser, step)))
        stack.enter_context(suppress(StoppedError))
        call()
    latent = latent_name(next(iter(denoisers.values())))
    rows = len(step.inputs[latent]) if step.inputs else 0
    if not rows:
        raise UserError(
            f"{type(pipe).__name__} makes no unconditional pass in this call, whose tokens the adapter needs: give a "
            "negative_prompt"
        )
    size = rows // place["chunks"]
    return negative_tokens(step.inputs, latent, slice(place["chunk"] * size, (place["chunk"] + 1) * size))


@contextmanager
def restored(generators: Any) -> Iterator[None]:
    """Restore the states of the random generators, and of torch's own, afterwards."""
    given = generators if isinstance(generators, list) else [generators]
    states = [(generator, generator.get_state()) for generator in given if generator is not None]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    for generator, state in states:
        generator.set_state(state)
