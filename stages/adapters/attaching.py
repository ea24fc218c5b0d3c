"""How an adapter is attached: to a denoiser or to pipelines, by hooks or in the base's own weights, and at which scale it guides."""

from __future__ import annotations

import inspect
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.fusing import LowRank
from stages.adapters.guidance import Guidance, Scales, ScaleSchedule, as_scales
from stages.adapters.one_pass import OnePass
from stages.adapters.riding import Fused, begin_ride, end_ride, is_ridden, ride_of
from stages.denoiser import denoiser_of, forget_compiled, uncompiled
from stages.errors import UserError
from stages.sampling import scale_keyword

Self = TypeVar("Self", bound="Attachable")


class Attachable(nn.Module, ABC):
    """What every variant does alike once it is attached.

    Attributes:
        about: what the adapter's folder tells: conditions, trained scale range, base.
        guidance, schedule: in force, if there are any.
        fused: whether the last guided call of a pipeline ran the base's own modules alone.
        fusible: whether the variant is a change of weights at one scale.
    """

    fusible: ClassVar[bool] = False
    about: dict[str, Any]
    sites: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.guidance: Guidance | None = None
        self.schedule: ScaleSchedule | None = None
        self.fused: bool | None = None
        self.told: set[str] = set()  # why calls ran unfused
        self.warned_of_negative = False
        self._exact: dict[str, Tensor] = {}  # the sites' weights, while they have a pipeline's precision
        self._denoiser: weakref.ref[nn.Module] | None = None
        self._pipelines: list[OnePass] = []
        self._targets: list[weakref.ref[Any]] = []

    # What a variant brings

    @property
    @abstractmethod
    def sees_negative(self) -> bool:
        """Whether it knows the tokens of the unconditional pass."""

    @abstractmethod
    def check_fit(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: the base has other sites.
        """

    @abstractmethod
    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        """Prepare a forward pass with these arguments; the arguments to go on with, if they change."""

    @abstractmethod
    def after_forward(self, denoiser: nn.Module, output: Any) -> Any:
        """End a forward pass; its output, if it changes."""

    @abstractmethod
    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Have each site add its part to its module's output."""

    @abstractmethod
    def lora_weights(self, guidance_scale: float) -> LowRank:
        """The change of every site's weights at one scale, of a variant that is one."""

    @abstractmethod
    def why_unfused(self, denoiser: nn.Module) -> str | None:
        """Why this adapter runs by hooks on this denoiser; None where it can be fused."""

    # Attaching

    def attach(self: Self, target: Any, backup_device: str | torch.device | None = None) -> Self:
        """Ride on a denoiser, or on a pipeline, whose `guidance_scale` then means this adapter in a single pass.

        Further pipelines with the same denoiser (image to image, inpainting) can be attached too. The adapter follows the latents
        to their device.

        Args:
            backup_device: where the base's own weights are kept while a scale is fused into them; by default beside them.

        Raises:
            UserError: it rides already, or the base has other sites than the adapter was made for.
        """
        is_denoiser = isinstance(target, nn.Module)
        denoiser: Any = uncompiled(target) if is_denoiser else denoiser_of(target)[1]
        again = is_denoiser or any(pipeline.pipe is target for pipeline in self._pipelines)
        if self._denoiser is not None and (again or self._denoiser() is not denoiser):
            raise UserError("this adapter is attached already: detach it first")
        if not is_denoiser:
            scale_keyword(target)  # refused before anything is attached
        if self._denoiser is None:
            if is_ridden(denoiser):
                raise UserError(
                    f"this {type(denoiser).__name__} carries an adapter already (a copy carries the original's): detach that one "
                    "first, or load the pipeline anew"
                )
            self.check_fit(denoiser)
            begin_ride(denoiser, backup_device)
            self._denoiser = weakref.ref(denoiser)
        self._targets.append(weakref.ref(target))
        if not is_denoiser:
            self._pipelines.append(OnePass(target, self))
        if is_denoiser or not self.fusible:
            self._hook(denoiser)
        return self

    def detach(self) -> None:
        """Leave the base as it was.

        Raises:
            UserError: something else changed weights that a scale is fused into.
        """
        denoiser = self.denoiser
        for pipeline in self._pipelines:
            pipeline.undo()
        self._pipelines.clear()
        self._targets.clear()
        self._denoiser = None
        self._restore_precision()
        if denoiser is not None:
            with ride_of(denoiser).lock:
                end_ride(denoiser)

    @property
    def denoiser(self) -> nn.Module | None:
        """What the adapter is attached to."""
        return None if self._denoiser is None else self._denoiser()

    def check_carried(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: no adapter rides on a denoiser that is about to run.
        """
        if not is_ridden(denoiser):
            raise UserError(
                f"this {type(denoiser).__name__} took the place of the one that the adapter was attached to: detach it, and attach it anew"
            )
        if self.fusible and any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
            raise UserError(
                f"this {type(denoiser).__name__} runs query, key and value as one layer, which the adapter does not know: "
                "unfuse_qkv_projections() first"
            )

    # Fusing

    def fuse(self: Self, guidance_scale: float, strength: float = 1.0) -> Self:
        """Put one scale into the weights of the base that the adapter is attached to, as diffusers' `fuse_lora` does.

        A pass then runs the base's own modules alone. Another scale fuses anew. A pipeline's call at another `guidance_scale`
        fuses that one for its time; one that names none has this one. It takes the memory of one copy of the adapted layers (see
        `attach`).

        Args:
            strength: the change is added so many times, also in calls at this scale; a schedule adds each scale's once.

        Raises:
            UserError: the adapter, or the base as it is, cannot be fused.
        """
        denoiser = self.denoiser
        if denoiser is None:
            raise UserError("the adapter is not attached: attach it first")
        scales = as_scales(guidance_scale)
        if len(scales) != 1:
            raise UserError(f"guidance_scale={guidance_scale}: one scale is fused for all images")
        if reason := self.why_unfused(denoiser):
            raise UserError(f"guidance_scale={guidance_scale} cannot be fused: {reason}")
        self.warn_outside(scales)
        with ride_of(denoiser).lock:
            self.put(denoiser, Fused(float(scales), strength))
        return self

    def unfuse(self) -> None:
        """Restore the base's own weights, bit for bit; the adapter stays attached.

        Raises:
            UserError: something else changed the weights meanwhile.
        """
        if self.denoiser is not None:
            with ride_of(self.denoiser).lock:
                self.put(self.denoiser, None)

    def put(self, denoiser: nn.Module, fused: Fused | None) -> None:
        """Have a denoiser's weights hold one scale, or their own values; hooks go where a scale comes, or both would guide."""
        ride = ride_of(denoiser)
        if fused is not None:
            self._unhook(denoiser)
        if fused is not None and fused.guidance_scale != 1:
            device = next(denoiser.parameters()).device
            self.follow(device)
            with torch.autocast(device.type, enabled=False):
                ride.put(denoiser, fused, self.lora_weights(fused.guidance_scale))
            return
        ride.restore(fused)
        if fused is None and self._is_on_denoiser:
            self._hook(denoiser)

    @property
    def _is_on_denoiser(self) -> bool:
        """Whether the adapter was attached to the denoiser itself, whose calls no pipeline sees."""
        return any(isinstance(target(), nn.Module) for target in self._targets)

    def follow(self, device: torch.device) -> None:
        if next(self.parameters()).device != device:
            self.to(device)

    # The guidance scale

    @contextmanager
    def guidance_scale(self, scale: Scales) -> Iterator[None]:
        """Within it, the denoiser guides itself: one scale for all images of a batch, or one per image.

        It comes before the scale of a pipeline's call, and after a schedule. A scale of 1 is an exact bypass, and so is one below,
        as in diffusers.
        A scale outside the trained range warns.
        """
        guidance, denoiser = Guidance(as_scales(scale)[None]), self.denoiser
        self.warn_outside(guidance.scales)
        holds = denoiser is not None and (self._pipelines or ride_of(denoiser).fused is not None)
        with self.guiding(denoiser, guidance) if denoiser is not None and holds else self.in_force(guidance):
            yield

    @contextmanager
    def guidance_schedule(self, schedule: ScaleSchedule) -> Iterator[None]:
        """Within it, attached pipelines guide by step: an interval, a ramp.

        Args:
            schedule: one entry per step, each as `guidance_scale` takes it, or a function of the step and its timestep (as the
                scheduler counts: from 1000 down) that gives one. A scale of 1 is no guidance at that step.
        """
        if not self._pipelines:
            raise UserError("a schedule of scales needs a pipeline, which knows the steps: attach the adapter to one")
        before, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule = before

    @contextmanager
    def guiding(self, denoiser: nn.Module, guidance: Guidance) -> Iterator[None]:
        """Within it, a denoiser guides itself so: by its own weights where they can hold the scale, else by hooks."""
        ride, outer = ride_of(denoiser), self.guidance
        with ride.lock, self.in_force(guidance):
            before, hooked = ride.fused, outer is not None and bool(ride.handles)
            try:
                self.steer(denoiser, guidance)
                yield
            finally:
                if is_ridden(denoiser):  # else it was detached meanwhile
                    if ride.fused != before:
                        self.put(denoiser, before)
                    if hooked:
                        self._hook(denoiser)

    def steer(self, denoiser: nn.Module, guidance: Guidance) -> None:
        """Fuse the scale of a guidance, or have hooks guide."""
        reason = self.why_unfused(denoiser)
        if reason is None and guidance.one_scale is None:
            reason = "the images of a batch have scales of their own"
        self.fused = reason is None
        if reason is not None:
            if self.fusible:
                self.tell_once(f"the guidance is not fused, so that a pass pays for it: {reason}")
            self.put(denoiser, None)
            self._hook(denoiser)
            return
        held, scale = ride_of(denoiser).fused, guidance.one_scale or 1.0
        if held is None or held.guidance_scale != scale:
            self.put(denoiser, Fused(scale))

    @contextmanager
    def in_force(self, guidance: Guidance) -> Iterator[None]:
        """Within it, hooks guide so."""
        before, self.guidance = self.guidance, guidance
        try:
            yield
        finally:
            self.guidance = before

    def warn_outside(self, scales: Tensor) -> None:
        """Say where scales lie outside the range of the training."""
        low, high = self.about["scale_range"]
        outside = scales[(scales != 1) & ((scales < low) | (scales > high))]
        if len(outside):
            trained = f"the range {low:g} to {high:g} that" if low < high else f"{low:g}, the one scale that"
            warnings.warn(
                f"guidance_scale {outside[0]:g} is outside {trained} this adapter was trained at",
                stacklevel=5,
            )

    def tell_once(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            warnings.warn(message, stacklevel=5)

    # Hooks

    def _hook(self, denoiser: nn.Module) -> None:
        """Add the hooks, unless they are there; the sites take a pipeline's precision."""
        ride = ride_of(denoiser)
        if ride.handles:
            return
        dtype = next(denoiser.parameters()).dtype
        if self._pipelines and dtype != next(self.sites.parameters()).dtype:
            self._exact = {name: value.clone() for name, value in self.sites.state_dict().items()}
            self.sites.to(dtype=dtype)
        ride.handles.extend(self._hooks(denoiser))
        self._forget_compiled()

    def _unhook(self, denoiser: nn.Module) -> None:
        if ride_of(denoiser).unhook():
            self._forget_compiled()
            self._restore_precision()

    @torch.no_grad()
    def _restore_precision(self) -> None:
        """Give the sites the precision back that they had before hooks took the pipeline's."""
        if self._exact:
            self.sites.to(dtype=next(iter(self._exact.values())).dtype)
            self.sites.load_state_dict(self._exact)
            self._exact = {}

    def _forget_compiled(self) -> None:
        for reference in self._targets:
            target = reference()
            if target is not None:
                forget_compiled(target if isinstance(target, nn.Module) else getattr(target, denoiser_of(target)[0]))

    def _hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks are plain functions: a deep copy of the denoiser shares them, and so is guided by this adapter too."""
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            changed = self.before_forward(module, {name: given[name] for name in names if name in given})
            return None if changed is None else ((), changed)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self.after_forward(module, output)

        yield denoiser.register_forward_pre_hook(before, with_kwargs=True)
        yield denoiser.register_forward_hook(after, with_kwargs=True, always_call=True)
        yield from self.site_hooks(denoiser)
