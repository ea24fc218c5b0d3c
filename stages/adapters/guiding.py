"""Setting an adapter's scale: fused until further notice, for a block of code, or by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.attachment import Context, Fusion, attachment_of, is_attached
from stages.adapters.denoiser_controller import DenoiserController
from stages.adapters.guidance import Guidance, Scales, ScaleSchedule, as_scales, check_schedule
from stages.adapters.scale_overrides import innermost_context, overriding
from stages.errors import UserError

Self = TypeVar("Self", bound="Guiding")


class Guiding(AdapterBase):
    """The user's ways of setting the scale, the same for every variant."""

    def fuse(self: Self, guidance_scale: float, strength: float = 1.0) -> Self:
        """Fuse one scale into the weights of the attached base, as diffusers' `fuse_lora` does.

        A pass then runs the base's own modules only. Another scale replaces this one. A pipeline's call at another
        `guidance_scale` fuses that scale for the duration of the call; a call that names none uses this one. Fusing
        keeps one copy of the adapted layers in memory (see `attach`).

        Args:
            strength: multiplies the change, also in calls at this scale; other scales use strength 1.

        Raises:
            UserError: the variant, or the base in its present state, cannot be fused.
        """
        denoiser = self.denoiser
        if denoiser is None:
            raise UserError("the adapter is not attached: attach it first")
        scales = as_scales(guidance_scale)
        if len(scales) != 1:
            raise UserError(f"guidance_scale={guidance_scale}: give one scale, which is fused for all images")
        if reason := self.why_unfused(denoiser):
            raise UserError(f"guidance_scale={guidance_scale} cannot be fused: {reason}")
        controller = DenoiserController(self, denoiser)
        controller.check_layers()
        self.warn_outside_range(scales)
        controller.set_default_fusion(Fusion(float(scales), strength))
        return self

    def unfuse(self) -> None:
        """Restore the base's own weights, bit for bit; the adapter stays attached.

        Raises:
            UserError: other code has changed the weights meanwhile.
        """
        if self.denoiser is not None:
            DenoiserController(self, self.denoiser).set_default_fusion(None)

    @contextmanager
    def guidance_scale(self, scale: Scales) -> Iterator[None]:
        """Guide at this scale within the context: one scale for all images of a batch, or one per image.

        The scale takes precedence over a pipeline call's own and over enclosing contexts. Other threads are not
        affected. A scale of 1 or below is an exact bypass, as in diffusers. A scale outside the trained range warns.
        """
        guidance = Guidance(as_scales(scale)[None])
        if self.denoiser is not None:
            DenoiserController(self, self.denoiser).check_layers()
        self.warn_outside_range(guidance.scales)
        context = Context(guidance, innermost_context(self))
        with overriding(self, context), self._between_calls(context):
            yield

    @contextmanager
    def guidance_schedule(self, schedule: ScaleSchedule) -> Iterator[None]:
        """Guide attached pipelines by step within the context, e.g. on an interval.

        The schedule takes precedence over enclosing contexts.

        Args:
            schedule: one entry per step, each as `guidance_scale` takes it, or a function of the step and the
                scheduler's timestep (from 1000 down) that returns one. A scale of 1 is no guidance at that step.
        """
        if not self.pipelines:
            raise UserError("a schedule of scales needs a pipeline, which knows the steps: attach the adapter to one")
        check_schedule(schedule)
        with overriding(self, schedule):
            yield

    @contextmanager
    def _between_calls(self, context: Context) -> Iterator[None]:
        """Guide calls of the denoiser without a pipeline too. The lock is not held, so pipelines may be called."""
        denoiser = self.denoiser
        if denoiser is None or not (self.pipelines or attachment_of(denoiser).default_fusion):
            with self.guided_by(context.guidance):
                yield
            return
        with self._in_context(denoiser, context), self.guided_by(context.guidance, all_threads=False):
            yield

    @contextmanager
    def _in_context(self, denoiser: nn.Module, context: Context) -> Iterator[None]:
        """Add a context to those of a denoiser."""
        attachment, controller = attachment_of(denoiser), DenoiserController(self, denoiser)
        attachment.contexts.append(context)
        controller.restore_idle()
        try:
            yield
        finally:
            attachment.contexts.remove(context)
            if is_attached(denoiser) and attachment_of(denoiser) is attachment:  # else it was detached meanwhile
                controller.restore_idle()
