"""The guidance of a forward pass: scales by step and image, and the state of the pass."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.errors import UserError

Scales = float | Sequence[float] | Tensor  # one for all images of a batch, or one per image
# Scales per step: one entry per step, or a function of (step, timestep).
ScaleSchedule = Sequence[Scales] | Callable[[int, float], Scales]
Prepared = list[tuple[Tensor, ...]]  # for each site


def as_scales(scale: Scales, offset: float = 0.0) -> Tensor:
    """Convert to scales `[images]`; a scale below 1 becomes 1, no guidance, as in diffusers.

    Args:
        offset: added to each scale: pipelines that guide by `c + w (c - u)` count from 0.

    Raises:
        UserError: a value is not a finite number; not checked on a GPU, where a check would stall training.
    """
    try:
        scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"guidance_scale={scale}: give a number, or one for each image") from error
    if scales.device.type == "cpu" and not (len(scales) and bool(scales.isfinite().all())):
        raise UserError(f"guidance_scale={scale}: give a finite number, or one for each image")
    return (scales + offset).clamp(min=1)


def check_schedule(schedule: ScaleSchedule) -> None:
    """
    Raises:
        UserError: it is a function that does not take a step and a timestep.
    """
    if not callable(schedule):
        return
    try:
        inspect.signature(schedule).bind(0, 0.0)
    except TypeError as error:
        raise UserError(f"a schedule of scales is a function of the step and the timestep: {error}") from error
    except ValueError:  # compiled code has no signature
        return


def scales_of_schedule(schedule: ScaleSchedule, timesteps: Tensor) -> Tensor:
    """Return scales `[steps, images]` at the scheduler's timesteps `[steps]`.

    Raises:
        UserError: the number of entries differs from that of steps, or the numbers of images differ between steps.
    """
    steps = len(timesteps)
    if callable(schedule):
        rows = [as_scales(schedule(i, t)) for i, t in enumerate(timesteps.tolist())]
    else:
        given = list(schedule) if isinstance(schedule, Sequence) else [schedule]
        if len(given) != steps:
            raise UserError(f"{len(given)} guidance scales were given for {steps} steps: give one per step")
        rows = [as_scales(scale) for scale in given]
    if len(images := {len(row) for row in rows} - {1}) > 1:
        raise UserError(
            f"the schedule has scales for {min(images)} images at one step and {max(images)} at another: "
            "give one per image"
        )
    return torch.stack(torch.broadcast_tensors(*rows))


class Guidance:
    """The scales of one or more forward passes.

    Attributes:
        scales: `[steps, images]`; one row if all steps are equal, one column if all images are.
        timesteps: `[steps]` in the denoiser's counting; None if all steps are equal.
        is_readable: whether the values are on the CPU; reading those of a training batch on a GPU would stall it.
        negative: inputs of the unconditional pass for the adapter, `negative.NAME` `[n, ...]`.
        bypass: whether no sample is guided at any step, so that the adapter does not run.
        mixed: whether a batch may have unguided samples.
        is_uniform: whether at each step all images have the same scale.
        one_scale: the scale of all images at every step; None if scales differ or are not readable.
    """

    def __init__(
        self,
        scales: Tensor,
        timesteps: Tensor | None = None,
        negative: dict[str, Tensor] | None = None,
    ) -> None:
        self.scales, self.timesteps = scales, timesteps
        self._scales, self._timesteps = scales, timesteps
        self.negative = negative or {}
        self.is_readable = scales.device.type == "cpu"
        self.bypass = self.is_readable and bool((scales == 1).all())
        self.mixed = not self.is_readable or bool((scales == 1).any())
        self.is_uniform = self.is_readable and bool((scales == scales[:, :1]).all())
        is_constant = self.is_uniform and bool((scales == scales[0, 0]).all())
        self.one_scale = float(scales[0, 0]) if is_constant else None

    def to(self, device: torch.device) -> None:
        """Move the tables for `row` and `at` to a device."""
        if self._scales.device == device:
            return
        self._scales = self.scales.to(device)
        self._timesteps = None if self.timesteps is None else self.timesteps.to(device)

    def row(self, timestep: Tensor) -> Tensor:
        """Return the index `[1]` of a timestep's step, without synchronising the GPU."""
        if self._timesteps is None:
            return torch.zeros(1, dtype=torch.long, device=timestep.device)
        return (self._timesteps - timestep.flatten()[:1].float()).abs().argmin(keepdim=True)

    def at_step(self, timestep: Tensor | float) -> Guidance:
        """Return the guidance of a timestep's step; a timestep on a GPU synchronises."""
        assert self.timesteps is not None
        nearest = int((self.timesteps - float(torch.as_tensor(timestep).flatten()[0])).abs().argmin())
        return Guidance(self.scales[nearest : nearest + 1], negative=self.negative)

    def at(self, row: Tensor, n: int) -> Tensor:
        """Return the scales `[n]` of a batch at one step."""
        return spread(self._scales.index_select(0, row), n)[0]


def spread(scales: Tensor, n: int) -> Tensor:
    """Repeat scales `[steps, images]` to `[steps, n]`; the samples of one image are adjacent.

    Raises:
        UserError: n is not a multiple of the number of images.
    """
    images = scales.shape[1]
    if n % images:
        raise UserError(f"{images} guidance scales were given for a batch of {n}: give one per image, or one for all")
    return scales.repeat_interleave(n // images, dim=1)


class ForwardState:
    """The state of a denoiser's forward pass.

    Attributes:
        guidance: the guidance to apply; None for none.
        began: whether a forward pass has begun.
        prepared: tensors for each site, computed once for the pass; None if the adapter does nothing.
        gate: `[n]`, which samples are guided; None if all are.
    """

    guidance: Guidance | None = None
    began: bool = False
    prepared: Prepared | None = None
    gate: Tensor | None = None


class ThreadState(ForwardState, threading.local):
    """The state of one thread's forward pass, so that several threads can share an adapter."""
