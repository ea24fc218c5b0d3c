"""The guidance that is in force during a forward pass: scales by step and image, and what is computed beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.errors import UserError

Scales = float | Sequence[float] | Tensor  # one for all images of a batch, or one per image
# Scales per step: a list of so many as there are steps, or a function of (step, timestep).
ScaleSchedule = Sequence[Scales] | Callable[[int, float], Scales]
Prepared = list[tuple[Tensor, ...]]  # of every site


def as_scales(scale: Scales, offset: float = 0.0) -> Tensor:
    """Scales `[images]`; one below 1 is no guidance, as in diffusers.

    Args:
        offset: added to each: pipelines that guide by `c + w (c - u)` count from 0.

    Raises:
        UserError: it is no scale; those on a GPU are a batch in training, which must not wait for it.
    """
    try:
        scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"guidance_scale={scale}: give a number, or one for each image") from error
    if scales.device.type == "cpu" and not (len(scales) and bool(scales.isfinite().all())):
        raise UserError(f"guidance_scale={scale}: give a finite number, or one for each image")
    return (scales + offset).clamp(min=1)


def scales_of_schedule(schedule: ScaleSchedule, timesteps: Tensor) -> Tensor:
    """Scales `[steps, images]` at the scheduler's timesteps `[steps]`.

    Raises:
        UserError: a list of another length than there are steps, or steps for other numbers of images.
    """
    steps = len(timesteps)
    if callable(schedule):
        rows = [as_scales(schedule(i, t)) for i, t in enumerate(timesteps.tolist())]
    else:
        given = list(schedule) if isinstance(schedule, Sequence) else [schedule]
        if len(given) != steps:
            raise UserError(f"{len(given)} guidance scales were given for {steps} steps: one per step")
        rows = [as_scales(scale) for scale in given]
    if len(images := {len(row) for row in rows} - {1}) > 1:
        raise UserError(
            f"a schedule of scales for {min(images)} images at one step and {max(images)} at another: one per image"
        )
    return torch.stack(torch.broadcast_tensors(*rows))


class Guidance:
    """Scales at which the denoiser guides itself.

    Attributes:
        scales: `[steps, images]`, one row where all steps are alike; images 1 where all are alike.
        timesteps: `[steps]` as the denoiser is given them; None where all steps are alike.
        is_readable: whether the values may be looked at: those on a GPU are a batch in training, which must not wait for it.
        negative: of the unconditional pass, `negative.NAME` `[n, ...]`, where the adapter sees it; the denoiser does not.
        bypass: no sample is guided at any step: the adapter is not even asked.
        mixed: a sample may be unguided beside others that are not.
        is_uniform: whether at each step all images have the same scale.
        one_scale: the same for all images at every step; None where scales differ, or may not be looked at.
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
        alike = self.is_uniform and bool((scales == scales[0, 0]).all())
        self.one_scale = float(scales[0, 0]) if alike else None

    def to(self, device: torch.device) -> None:
        """Look up on a device from now on."""
        if self._scales.device == device:
            return
        self._scales = self.scales.to(device)
        self._timesteps = None if self.timesteps is None else self.timesteps.to(device)

    def row(self, timestep: Tensor) -> Tensor:
        """Index `[1]` of the step that a timestep belongs to, found without making the GPU wait."""
        if self._timesteps is None:
            return torch.zeros(1, dtype=torch.long, device=timestep.device)
        return (self._timesteps - timestep.flatten()[:1].float()).abs().argmin(keepdim=True)

    def at_step(self, timestep: Tensor | float) -> Guidance:
        """The guidance of the step that a timestep belongs to; a timestep on a GPU is waited for."""
        assert self.timesteps is not None
        nearest = int((self.timesteps - float(torch.as_tensor(timestep).flatten()[0])).abs().argmin())
        return Guidance(self.scales[nearest : nearest + 1], negative=self.negative)

    def at(self, row: Tensor, n: int) -> Tensor:
        """Scales `[n]` of a batch at one step."""
        return spread(self._scales.index_select(0, row), n)[0]


def spread(scales: Tensor, n: int) -> Tensor:
    """Scales `[steps, n]` from `[steps, images]`, where the samples of one image lie side by side.

    Raises:
        UserError: n samples are not so many images.
    """
    images = scales.shape[1]
    if n % images:
        raise UserError(f"{images} guidance scales were given for a batch of {n}: one per image, or one for all")
    return scales.repeat_interleave(n // images, dim=1)


class ForwardState:
    """What is in force while a denoiser runs.

    Attributes:
        guidance: of its calls.
        began: whether a forward pass began.
        prepared: of every site, computed before that pass; None where the adapter stands aside.
        gate: `[n]`, which samples are guided; None where all are.
    """

    guidance: Guidance | None = None
    began: bool = False
    prepared: Prepared | None = None
    gate: Tensor | None = None


class ThreadState(ForwardState, threading.local):
    """What is in force in one thread, so that calls in several threads may share an adapter."""
