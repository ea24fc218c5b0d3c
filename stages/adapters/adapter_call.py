"""One adapter's guidance through one call of a pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.attachment import Context
from stages.adapters.denoiser_controller import DenoiserController
from stages.adapters.guidance import Guidance, Scales, as_scales, scales_of_schedule
from stages.base.denoiser import bind_inputs
from stages.base.patching import patched
from stages.errors import UserError


class AdapterCall:
    """One adapter's guidance through one call: at one scale, or by step.

    Args:
        scale: the scale of the call; an override that this thread has opened precedes it.
        attribute: where the pipeline keeps its scale, for callbacks.
        negative: tokens of the unconditional pass; empty if the adapter does not see them.
    """

    def __init__(
        self,
        controller: DenoiserController,
        pipe: Any,
        component: str,
        scale: Scales,
        attribute: str,
        negative: dict[str, Tensor],
    ) -> None:
        self.controller, self.pipe, self.component, self.attribute = controller, pipe, component, attribute
        self.offset = controller.metadata.scale_offset
        override = controller.override
        self.schedule = None if override is None or isinstance(override, Context) else override
        if isinstance(override, Context):
            scales = override.guidance.scales
        else:
            scales = as_scales(1.0 if self.schedule is not None else scale)[None]
            controller.warn_outside_range(scales)
        self.guidance = Guidance(scales, negative=negative)
        self.awaits_timesteps = self.schedule is not None

    @contextmanager
    def guiding(self) -> Iterator[AdapterCall]:
        """Guide the denoiser within the context."""
        with self.controller.guiding(self.guidance), ExitStack() as stack:
            if self.schedule is not None:
                stack.enter_context(self._by_step())
            yield self

    def set_scale(self, scale: Scales) -> None:
        """Guide at another scale from now on, in the pipeline's own counting."""
        scales = as_scales(scale, self.offset)[None]
        self.controller.warn_outside_range(scales)
        self.guidance = Guidance(scales, negative=self.guidance.negative)
        self.controller.set_guidance(self.guidance)
        self.controller.apply(self.guidance)

    def scale_at(self, timestep: Tensor | None) -> Any:
        """Return the scale at a scheduler's timestep, in the pipeline's counting: a number, or `[images]`."""
        guidance = self.guidance
        if guidance.timesteps is not None:
            guidance = guidance.at_step(
                guidance.timesteps[0] if timestep is None else self._to_denoiser_timesteps(timestep.float().cpu())
            )
        return (guidance.scales[0] if guidance.one_scale is None else guidance.one_scale) - self.offset

    def _to_denoiser_timesteps(self, timesteps: Tensor) -> Tensor:
        """Convert the scheduler's timesteps to the denoiser's."""
        metadata = self.controller.metadata
        return timesteps * metadata.timestep_scale + metadata.timestep_offset

    @contextmanager
    def _by_step(self) -> Iterator[None]:
        """Look up the scale of each step, once the pipeline has set the timesteps."""
        scheduler, timestep = self.pipe.scheduler, self.controller.metadata.timestep
        thread = threading.get_ident()

        def after_set_timesteps(set_timesteps: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            # Second-order schedulers list a timestep twice.
            timesteps = torch.unique_consecutive(scheduler.timesteps.float().cpu())
            assert self.schedule is not None
            scales = scales_of_schedule(self.schedule, timesteps)
            self.controller.warn_outside_range(scales)
            self.guidance = Guidance(scales, self._to_denoiser_timesteps(timesteps), self.guidance.negative)
            self.controller.set_guidance(self.guidance)
            if not self.guidance.is_uniform:  # else `before_denoiser` fuses each step
                self.controller.apply(self.guidance)
            self.awaits_timesteps = False

        @torch.compiler.disable
        def before_denoiser(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != thread:  # another call, on the same denoiser
                return
            if self.awaits_timesteps:
                raise UserError(
                    f"{type(self.pipe).__name__} runs before its scheduler has set the timesteps, which a schedule "
                    "of scales needs: name one guidance_scale for all steps"
                )
            guidance = self.guidance
            if guidance.timesteps is not None and guidance.is_uniform:
                self.controller.apply(guidance.at_step(bind_inputs(self.controller.denoiser, args, kwargs)[timestep]))

        outermost = getattr(self.pipe, self.component)
        hook = outermost.register_forward_pre_hook(before_denoiser, with_kwargs=True, prepend=True)
        try:
            with patched(scheduler, "set_timesteps", after_set_timesteps):
                yield
        finally:
            hook.remove()
