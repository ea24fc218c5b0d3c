"""The recorder hooks into an unmodified pipeline and keeps the inputs of its denoiser and of its scheduler.

It writes no sampling loop, scheduler or guidance rule again: the target is the prediction that `scheduler.step`
receives,
after the pipeline has combined its passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.base.denoiser import STEP
from stages.base.hooks import Call, watch_steps
from stages.errors import UserError
from stages.generate.layout import Layout, Pass, constants_of


@dataclass(frozen=True)
class Recording:
    """The recording of a batch of n trajectories, m records in all, step by step.

    Attributes:
        latent: `[m, ...]`; timestep: `[m]`; target: `[m, ...]`.
        guidance_cosine, guidance_delta: `[m]`, the results of `guidance_effect`.
        owner: `[m]`, the index in the batch of each record's trajectory; step: `[m]`, its denoising step.
        cond: every other per-sample tensor of the conditional pass, `[n, ...]`, by the denoiser's own names.
        steps: those that change from step to step `[m, ...]`, named `step.NAME`.
        denoiser: `[m]`, the index of each record's denoiser in the layout.
        negative: token embeddings of the unconditional pass and their masks `[n, ...]`, named `negative.NAME`.
    """

    latent: Tensor
    timestep: Tensor
    target: Tensor
    guidance_cosine: Tensor
    guidance_delta: Tensor
    owner: Tensor
    step: Tensor
    denoiser: Tensor
    cond: dict[str, Tensor]
    steps: dict[str, Tensor]
    negative: dict[str, Tensor]


class Recorder:
    """Records the denoiser's conditional inputs and the guided prediction, step by step."""

    def __init__(self, layout: Layout, n: int, steps: Tensor | None = None) -> None:
        """
        Args:
            n: samples in the batch.
            steps: `[n, k]`, the k steps to record of each sample; None for all.
        """
        self.layout, self.n, self.steps = layout, n, steps
        self.step = 0
        self.parts: list[dict[str, Tensor]] = []
        self.cond: dict[str, Tensor] | None = None
        self.negative: dict[str, Tensor] = {}
        self.checked: dict[str, Any] = {}

    def see_step(self, calls: list[Call], received: list[Tensor]) -> None:
        """Record one step from its denoiser calls and the predictions that the scheduler and its copies received."""
        seen = self.layout.conditional(calls, self.n)
        self._check(calls, seen)
        self.negative = self.negative or self.layout.negative(calls, self.n)
        rows = torch.arange(self.n) if self.steps is None else (self.steps == self.step).any(1).nonzero().flatten()
        if len(rows):
            on_device = rows.to(seen.latent.device)
            target = self.layout.target(received, seen)[on_device]
            cosine, delta = guidance_effect(seen.prediction[on_device], target)
            part = {
                "latent": seen.latent[on_device],
                "timestep": seen.timestep[on_device],
                "target": target,
                "guidance_cosine": cosine,
                "guidance_delta": delta,
                "owner": rows,
                "step": torch.full((len(rows),), self.step),
                "denoiser": torch.full((len(rows),), self.layout.denoisers.index(seen.denoiser)),
            }
            self.parts.append(part | {name: value[on_device] for name, value in seen.steps.items()})
        self.step += 1

    def _check(self, calls: list[Call], seen: Pass) -> None:
        """Check that the conditions and constants are those of the first step.

        Raises:
            UserError: one has changed.
        """
        if self.cond is None:
            self.cond = {
                name: value.clone() for name, value in seen.cond.items()
            }  # pipelines may write into the tensor
        for name, value in seen.cond.items():
            if name not in self.cond or not torch.equal(value, self.cond[name]):
                raise UserError(
                    f"the denoiser's {name} changes from step to step: it cannot be stored with a trajectory"
                )
        call = self.layout.conditional_call(calls)
        inputs = constants_of(call.inputs, self.layout.arguments)
        if any(
            self.checked.get(name) is not value for name, value in inputs.items()
        ):  # mostly a pipeline passes the same objects
            self.layout.check_constants(call, self.n)
            self.checked = inputs

    def recording(self) -> Recording:
        whole = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        steps = {name: whole.pop(name) for name in list(whole) if name.startswith(STEP)}
        return Recording(**whole, cond=self.cond or {}, steps=steps, negative=self.negative)


def guidance_effect(conditional: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    """The distance by which guidance moves each sample's conditional prediction, over all elements.

    Args:
        conditional, guided: `[m, ...]`.

    Returns:
        Their cosine similarity (0 where one is zero) and the mean square of their difference; float32 `[m]` each.
    """
    c, g = (
        prediction.flatten(1).double() for prediction in (conditional, guided)
    )  # double: 1 - cosine is small at low scales
    return functional.cosine_similarity(c, g).float(), (g - c).square().mean(1).float()


@contextmanager
def record(pipe: Any, layout: Layout, n: int, steps: Tensor | None = None) -> Iterator[Recorder]:
    """Within the context, record a call of `pipe` for n samples; afterwards `pipe` is unchanged."""
    recorder = Recorder(layout, n, steps)
    streams = len(layout.target_channels)
    with watch_steps(pipe, lambda calls, received, _: recorder.see_step(calls, received), streams=streams):
        yield recorder
