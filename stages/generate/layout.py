"""The layout of a pipeline's guided step: which part of which denoiser call is the conditional one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.base.arguments import LENGTH, Arguments, encoded, stacked
from stages.base.denoiser import MASK, NEGATIVE, STEP, as_target, negative_tokens, part_of
from stages.base.hooks import Call
from stages.errors import UserError
from stages.records.teacher import LayoutFacts


@dataclass(frozen=True)
class Pass:
    """The conditional pass of one step for n samples.

    Attributes:
        latent: `[n, ...]`; timestep: `[n]`.
        predictions: `[n, ...]` each, only the channels that the scheduler steps by.
        cond: arguments that stay the same from step to step, `[n, ...]` by the denoiser's names, with masks and
            lengths.
        steps: arguments that change from step to step, `[n, ...]`, named `step.NAME`.
        denoiser: the name of the one that ran.
    """

    latent: Tensor
    timestep: Tensor
    predictions: list[Tensor]
    cond: dict[str, Tensor]
    steps: dict[str, Tensor]
    denoiser: str

    @property
    def prediction(self) -> Tensor:
        """In the shape of a record's target: `[n, ...]`, or `[n, elements]` for several predictions."""
        return as_target(self.predictions, [part.shape[1] for part in self.predictions])


@dataclass(frozen=True)
class Layout(LayoutFacts):
    """The layout of a pipeline's guided step, and the parts of a step that a record needs.

    Attributes:
        parts: the numbers of parts in the calls of a guided step; some rules make fewer passes at some steps.
    """

    parts: tuple[tuple[int, ...], ...] = ()

    def conditional(self, calls: list[Call], n: int) -> Pass:
        """The conditional pass of one step for n samples; a step without guidance has only this pass.

        Raises:
            UserError: the step has another number of calls or rows than in the trial runs.
        """
        call = self.conditional_call(calls)
        begin, end = self._run(self.arguments.rows(call.inputs), n)
        samples = self.arguments.samples(call.inputs, begin, end)
        latent, cond = samples.pop(self.arguments.latent), _tensors(samples)
        steps = {STEP + name: cond.pop(name) for name in self.arguments.steps if name in cond}
        cond = {name: value.bool() if name in self.masks else value for name, value in cond.items()}
        timestep = self.arguments.timesteps(call.inputs, n).to(latent.device)
        stepped = zip(call.predictions, self.target_channels, strict=False)
        predictions = [part_of(prediction[begin:end], channels) for prediction, channels in stepped]
        return Pass(latent, timestep, predictions, self._masked(cond), steps, call.denoiser)

    def conditional_call(self, calls: list[Call]) -> Call:
        """The denoiser call that holds the conditional pass.

        Raises:
            UserError: the step has another number of calls than in the trial runs.
        """
        if len(calls) not in {1, self.calls, *map(len, self.parts)}:
            raise UserError(f"{len(calls)} denoiser calls in one step where {self.calls} were found before")
        return calls[0] if len(calls) == 1 else calls[self.call]

    def _run(self, rows: int, n: int) -> tuple[int, int]:
        """(begin, end) of the n conditional samples in a batch with `rows` rows."""
        known = {1, self.chunks, *(parts[self.call] for parts in self.parts if len(parts) > self.call)}
        if rows not in {count * n for count in known}:
            raise UserError(
                f"{rows} rows in a denoiser call for {n} samples where {self.chunks} for each were found before"
            )
        return (0, n) if rows == n else (self.chunk * n, (self.chunk + 1) * n)

    def part(self, batch: Tensor, n: int) -> Tensor:
        """The n conditional samples of a batch with n rows, or with n rows per part."""
        begin, end = self._run(len(batch), n)
        return batch[begin:end]

    def target(self, received: list[Tensor], conditional: Pass) -> Tensor:
        """The single-pass prediction `[n, ...]` that would give the scheduler and its copies the same input."""
        n = len(conditional.timestep)
        parts = zip(self.target_signs, received, conditional.predictions, strict=True)
        targets = [sign * self.part(value, n).reshape(prediction.shape) for sign, value, prediction in parts]
        return as_target(targets, [part.shape[1] for part in targets])

    def check_constants(self, call: Call, n: int) -> None:
        """Check that a call's constant arguments are those of the trial runs.

        Raises:
            UserError: one has changed.
        """
        known, rows = self.arguments.constants, self.arguments.rows(call.inputs)
        for name, value in constants_of(call.inputs, self.arguments).items():
            if name not in known or known[name] not in (encoded(value, n), encoded(value, rows)):
                raise UserError(
                    f"the denoiser's {name} changes from call to call: it cannot be stored with a trajectory"
                )

    def changed_constants(self, other: Layout) -> dict[str, Any]:
        """The constant arguments in which this layout differs from another."""
        known = other.arguments.constants
        return {name: value for name, value in self.arguments.constants.items() if known.get(name) != value}

    def negative(self, calls: list[Call], n: int) -> dict[str, Tensor]:
        """The result of `negative_tokens` for a step of n samples; empty for a step without guidance."""
        if self.unconditional is None or len(calls) != self.calls:
            return {}
        number, chunk = self.unconditional
        inputs = calls[number].inputs
        if self.arguments.rows(inputs) <= chunk * n:
            return {}
        return self._masked(negative_tokens(inputs, self.arguments.latent, slice(chunk * n, (chunk + 1) * n)))

    def _masked(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add a mask of ones where the denoiser takes a mask and the call gives none."""
        for name, value in list(cond.items()):
            if name.removeprefix(NEGATIVE) + MASK in self.masks:
                cond.setdefault(name + MASK, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))
        return cond


def constants_of(inputs: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """The arguments of a call that belong to no sample, without the timestep."""
    return {
        name: value
        for name, value in inputs.items()
        if name != arguments.timestep and name.partition(".[")[0] not in arguments.axes and name not in arguments.axes
    }


def _tensors(samples: dict[str, Any]) -> dict[str, Tensor]:
    """Replace lists of tensors by padded tensors and their lengths."""
    cond: dict[str, Tensor] = {}
    for name, value in samples.items():
        whole, lengths = stacked(value) if isinstance(value, list) else (value, None)
        cond[name] = whole
        if lengths is not None:
            cond[name + LENGTH] = lengths
    return cond
