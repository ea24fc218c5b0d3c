"""The recorder rides inside an unmodified pipeline: it sees what the denoiser is given and what the scheduler is handed.

No sampling loop, no scheduler and no guidance is written here: the target is what `scheduler.step` receives, after
whatever the pipeline made of its passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.generate.layout import Layout
from stages.generate.watching import Call, watched


@dataclass(frozen=True)
class Recording:
    """What a batch of n trajectories gave, m records in all, step by step.

    Attributes:
        latent: `[m, ...]`; timestep: `[m]`; target: `[m, ...]`.
        guidance_cosine, guidance_delta: `[m]`, what `guidance_effect` finds.
        owner: `[m]`, the place in the batch of each record's trajectory; step: `[m]`, the denoising step it was.
        cond: every other tensor of the conditional pass with an entry per sample, `[n, ...]`, by the denoiser's own names.
        negative: token embeddings of the unconditional pass and their masks `[n, ...]`, named `negative.NAME`.
    """

    latent: Tensor
    timestep: Tensor
    target: Tensor
    guidance_cosine: Tensor
    guidance_delta: Tensor
    owner: Tensor
    step: Tensor
    cond: dict[str, Tensor]
    negative: dict[str, Tensor]


class Recorder:
    """Keeps the conditional part of what the denoiser is given, and the prediction that the pipeline settled on."""

    def __init__(self, layout: Layout, n: int, steps: Tensor | None = None) -> None:
        """
        Args:
            n: samples in the batch.
            steps: `[n, k]`, the steps to record of each sample; all by default.
        """
        self.layout, self.n, self.steps = layout, n, steps
        self.step = 0
        self.parts: list[tuple[Tensor, ...]] = []
        self.cond: dict[str, Tensor] | None = None
        self.negative: dict[str, Tensor] = {}

    def see_step(self, calls: list[Call], prediction: Tensor) -> None:
        """Keep one step: the denoiser's calls in it, and what the scheduler was handed."""
        conditional = self.layout.conditional(calls, self.n)
        inputs = conditional.inputs
        if self.cond is None:
            self.cond = self.layout.conditions(inputs, self.n)
        self.negative = self.negative or self.layout.negative(calls, self.n)
        rows = torch.arange(self.n) if self.steps is None else (self.steps == self.step).any(1).nonzero().flatten()
        if len(rows):
            here = rows.to(prediction.device)
            target = self.layout.part(prediction, self.n)[here]
            latent, timestep = inputs[self.layout.latent][here], inputs["timestep"][here]
            step = torch.full((len(rows),), self.step)
            effect = guidance_effect(conditional.prediction[here], target)
            self.parts.append((latent, timestep, target, *effect, rows, step))
        self.step += 1

    def recording(self) -> Recording:
        latent, timestep, target, cosine, delta, owner, step = map(torch.cat, zip(*self.parts, strict=True))
        return Recording(latent, timestep, target, cosine, delta, owner, step, self.cond or {}, self.negative)


def guidance_effect(conditional: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    """How far guidance moved each sample's conditional prediction, over all its elements.

    Args:
        conditional, guided: `[m, ...]`.

    Returns:
        The cosine similarity of the two, 0 where one is zero, and the mean square of their difference; float32 `[m]` each.
    """
    c, g = (prediction.flatten(1).double() for prediction in (conditional, guided))  # 1 - cosine is small at low scales
    return functional.cosine_similarity(c, g).float(), (g - c).square().mean(1).float()


@contextmanager
def record(pipe: Any, layout: Layout, n: int, steps: Tensor | None = None) -> Iterator[Recorder]:
    """Within it, a call of `pipe` for n samples is recorded; afterwards `pipe` is as it was."""
    recorder = Recorder(layout, n, steps)
    with watched(pipe, lambda calls, prediction, _: recorder.see_step(calls, prediction)):
        yield recorder
