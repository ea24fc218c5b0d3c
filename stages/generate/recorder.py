"""The recorder rides inside an unmodified pipeline: it sees what the denoiser is given and what the scheduler is handed.

No sampling loop and no scheduler is written here, and any guidance that a pipeline adds after its denoiser is recorded
as it acts, because the target is what `scheduler.step` receives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.base import bind_inputs, denoiser_of, latent_name
from stages.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recording:
    """What k steps of n trajectories gave.

    Attributes:
        latent: `[k, n, ...]`; timestep: `[k, n]`; target: `[k, n, ...]`.
        cond: every other tensor of the conditional pass, `[n, ...]`, by the denoiser's own argument names.
    """

    latent: Tensor
    timestep: Tensor
    target: Tensor
    cond: dict[str, Tensor]


class Recorder:
    """Gives every sample of a batch its own guidance scale, and keeps the records.

    At the denoiser it combines `g = u + w (c - u)` (arXiv 2207.12598, equation 6, in diffusers' convention for w)
    with one `w` per sample and hands the pipeline `cat([g, g])`. The pipeline's own combination
    `g + s (g - g)` then changes nothing, whatever its scale s.
    """

    def __init__(self, denoiser: nn.Module, guidance_scale: Tensor, requested: dict[str, Tensor]) -> None:
        """
        Args:
            guidance_scale: `[n]`, one per trajectory.
            requested: arguments of the denoiser, `[n, ...]`, of which the conditional half is known to be made; they
                tell which half of a doubled batch is the conditional one, since pipelines differ in their order.
        """
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.requested = requested
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.cond: dict[str, Tensor] = {}
        self.conditional_half = slice(0, 0)

    def see_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: keep the conditional half of the inputs, and guide the prediction, sample by sample."""
        if len(self.latents) != len(self.targets):
            raise UserError(
                f"{type(module).__name__} is called more than once per step: such pipelines cannot be recorded yet"
            )
        inputs = bind_inputs(module, args, kwargs)
        n = len(self.guidance_scale)
        latent = inputs.pop(latent_name(module))
        if len(latent) != 2 * n:
            raise UserError(
                f"{type(module).__name__} was given a batch of {len(latent)} for {n} guided samples, not of {2 * n}"
            )
        timestep = torch.as_tensor(inputs.pop("timestep")).expand(2 * n)
        if not self.latents:
            self.conditional_half = self._find_conditional_half(inputs)
            self.cond = {
                name: value[self.conditional_half]
                for name, value in inputs.items()
                if isinstance(value, Tensor) and len(value) == 2 * n
            }
        self.latents.append(latent[self.conditional_half])
        self.timesteps.append(timestep[self.conditional_half])
        prediction = output[0]
        guided = self._guide(prediction, channels=latent.shape[1])
        return (guided, *output[1:]) if isinstance(output, tuple) else dataclasses.replace(output, sample=guided)

    def see_step(self, prediction: Tensor) -> None:
        """Keep what `scheduler.step` is handed; pipelines that keep the batch doubled hand it over twice."""
        self.targets.append(
            prediction[self.conditional_half] if len(prediction) == 2 * len(self.guidance_scale) else prediction
        )

    def _find_conditional_half(self, inputs: dict[str, Any]) -> slice:
        n = len(self.guidance_scale)
        halves = [slice(0, n), slice(n, 2 * n)]
        fitting = [
            half
            for half in halves
            if all(torch.equal(inputs[name][half], value) for name, value in self.requested.items())
        ]
        if len(fitting) != 1:
            raise UserError(
                f"{type(self.denoiser).__name__}: which half of its batch is the conditional one is not certain"
            )
        return fitting[0]

    def _guide(self, prediction: Tensor, channels: int) -> Tensor:
        """Guide the channels that pipelines guide: all but the variance that a denoiser may have learned beside them."""
        n = len(self.guidance_scale)
        conditional = prediction[self.conditional_half, :channels]
        null_half = slice(n, 2 * n) if self.conditional_half.start == 0 else slice(0, n)
        unconditional = prediction[null_half, :channels]
        scale = self.guidance_scale.to(prediction).view(-1, *[1] * (prediction.ndim - 1))
        guided = unconditional + scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), prediction[:, channels:]], dim=1)

    def recording(self) -> Recording:
        return Recording(torch.stack(self.latents), torch.stack(self.timesteps), torch.stack(self.targets), self.cond)


@contextmanager
def record(pipe: Any, guidance_scale: Tensor, requested: dict[str, Tensor]) -> Iterator[Recorder]:
    """Within it, a call of `pipe` for n samples is recorded; afterwards `pipe` is as it was."""
    _, denoiser = denoiser_of(pipe)
    recorder = Recorder(denoiser, guidance_scale, requested)
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    def recorded_step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder.see_step(model_output)
        return step(model_output, *args, **kwargs)

    handle = denoiser.register_forward_hook(recorder.see_denoiser, with_kwargs=True)
    scheduler.step = recorded_step
    try:
        yield recorder
    finally:
        handle.remove()
        del scheduler.step


@contextmanager
def shifted_timesteps(scheduler: Any, shift: float) -> Iterator[None]:
    """Within it, the scheduler's grid lies `shift` (in [0, 1)) of its own spacing further on, inside the training range."""
    set_timesteps = scheduler.set_timesteps

    def shifted(num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        set_timesteps(num_inference_steps, *args, **kwargs)
        last = scheduler.config.num_train_timesteps - 1
        grid = scheduler.timesteps
        spacing = int(-grid.diff().min()) if len(grid) > 1 else last + 1
        room_above = last - int(grid.max())
        moved = int(shift * spacing) - max(0, spacing - 1 - room_above)
        scheduler.timesteps = (grid + moved).clamp(0, last)

    scheduler.set_timesteps = shifted
    try:
        yield
    finally:
        del scheduler.set_timesteps
