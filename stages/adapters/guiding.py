"""How an adapter that is attached guides a denoiser: by hooks or in the base's own weights, and at which scale."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.attachment import Context, Fused, attachment_of, is_attached
from stages.adapters.fusing import LowRank
from stages.adapters.guidance import Guidance, InForce, InThread, Prepared, Scales, ScaleSchedule, as_scales
from stages.adapters.user_warnings import warn
from stages.adapters.wrappers import entrance_of, is_compiled, runs_fused_projections, unwrapped
from stages.base.denoiser import denoiser_of
from stages.errors import UserError

Self = TypeVar("Self", bound="Guiding")
Asked = Context | ScaleSchedule
APART = ("here", "anywhere", "_denoiser", "_targets")  # what no copy of an adapter has of its original

# What is open in this thread or task, the innermost last, each with the adapter that it is asked of.
OPEN: ContextVar[tuple[tuple[Any, Asked], ...]] = ContextVar("open", default=())


class Guiding(nn.Module, ABC):
    """What every variant does alike while it guides.

    Attributes:
        metadata: what the adapter's folder tells: conditions, trained scale range, base.
        fused: whether the last guided call of a pipeline ran the base's own modules alone.
        fusible: whether the variant is a change of weights at one scale.
        exclusive: whether it changes the base in a forward pass, so that one thread at a time can call it.
    """

    fusible: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False
    metadata: dict[str, Any]
    sites: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.fused: bool | None = None
        self.warned: set[str] = set()  # why calls ran unfused
        self.warned_of_negative = False
        self._exact: dict[str, Tensor] = {}  # the sites' weights, while they have a pipeline's precision
        self._begin_apart()

    def _begin_apart(self) -> None:
        self.here, self.anywhere = InThread(), InForce()
        self._denoiser: weakref.ref[nn.Module] | None = None
        self._targets: list[weakref.ref[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an adapter, or one from another process, is attached to nothing."""
        return {name: value for name, value in vars(self).items() if name not in APART}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_apart()
        self._restore_precision()

    # What a variant brings

    @property
    @abstractmethod
    def sees_negative(self) -> bool:
        """Whether it knows the tokens of the unconditional pass."""

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

    # What is in force. Compiled code does not know threads, so that its calls go alone; and autograd runs checkpointed blocks
    # again in threads of its own, where no forward pass began. Both find what they need in `anywhere`.

    @property
    def _now(self) -> InForce:
        return self.anywhere if torch.compiler.is_compiling() or not self.here.begun else self.here

    @property
    def guidance(self) -> Guidance | None:
        """At which hooks guide."""
        return self.anywhere.guidance if torch.compiler.is_compiling() else self.here.guidance

    @property
    def prepared(self) -> Prepared | None:
        """Of the forward pass under way."""
        return self._now.prepared

    @prepared.setter
    def prepared(self, prepared: Prepared | None) -> None:
        self.anywhere.prepared = prepared
        if not torch.compiler.is_compiling():
            self.here.begun, self.here.prepared = True, prepared

    @property
    def gate(self) -> Tensor | None:
        """Of the forward pass under way."""
        return self._now.gate

    @gate.setter
    def gate(self, gate: Tensor | None) -> None:
        self.anywhere.gate = gate
        if not torch.compiler.is_compiling():
            self.here.begun, self.here.gate = True, gate

    @contextmanager
    def in_force(self, guidance: Guidance | None, anywhere: bool = True) -> Iterator[None]:
        """Within it, hooks guide so in this thread; anywhere else too, where nobody else can be using the adapter."""
        before, elsewhere = self.here.guidance, self.anywhere.guidance
        self.here.guidance = guidance
        if anywhere:
            self.anywhere.guidance = guidance
        try:
            yield
        finally:
            self.here.guidance = before
            if anywhere:
                self.anywhere.guidance = elsewhere

    # What it is attached to

    @property
    def denoiser(self) -> nn.Module | None:
        """What the adapter is attached to."""
        return None if self._denoiser is None else self._denoiser()

    @property
    def targets(self) -> list[Any]:
        """The denoisers and pipelines that were given to `attach`, and are still there."""
        return [target for reference in self._targets if (target := reference()) is not None]

    @property
    def pipelines(self) -> list[Any]:
        return [target for target in self.targets if not isinstance(target, nn.Module)]

    def component_in(self, pipe: Any) -> str:
        """What a pipeline calls the denoiser that this adapter was made for.

        Raises:
            UserError: it has no such part.
        """
        recorded = self.metadata.get("base", {}).get("denoiser_subfolder")
        if isinstance(getattr(pipe, recorded or "", None), nn.Module):
            return str(recorded)
        found, _ = denoiser_of(pipe)
        if recorded is not None and recorded.rpartition("_")[2].isdigit():
            raise UserError(
                f"{type(pipe).__name__} has no {recorded}, which the adapter was made for: attach the adapter of its {found}"
            )
        return found

    def denoiser_in(self, pipe: Any) -> nn.Module:
        """The denoiser of a pipeline that this adapter was made for, whatever wraps it."""
        return unwrapped(getattr(pipe, self.component_in(pipe)))

    def _outermost(self) -> Iterator[nn.Module]:
        """The denoiser as its callers know it, in whatever wraps it."""
        for target in self.targets:
            yield target if isinstance(target, nn.Module) else getattr(target, self.component_in(target))

    def check_layers(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: a denoiser runs layers that the adapter does not know.
        """
        if self.fusible and any(runs_fused_projections(module) for module in denoiser.modules()):
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
        self.check_layers(denoiser)
        self.warn_outside(scales)
        attachment, fused = attachment_of(denoiser), Fused(float(scales), strength)
        with attachment.lock.alone():
            self.put(denoiser, fused)
            attachment.held = fused
        return self

    def unfuse(self) -> None:
        """Restore the base's own weights, bit for bit; the adapter stays attached.

        Raises:
            UserError: something else changed the weights meanwhile.
        """
        if self.denoiser is not None:
            attachment = attachment_of(self.denoiser)
            with attachment.lock.alone():
                self.put(self.denoiser, None)
                attachment.held = None

    def put(self, denoiser: nn.Module, fused: Fused | None) -> None:
        """Have a denoiser's weights hold one scale, or their own values; hooks go where a scale comes, or both would guide."""
        attachment = attachment_of(denoiser)
        if fused is not None:
            self._unhook(denoiser)
        if fused is not None and fused.guidance_scale != 1:
            device = next(denoiser.parameters()).device
            self.follow(device)
            with torch.autocast(device.type, enabled=False):
                attachment.put(denoiser, fused, self.lora_weights(fused.guidance_scale))
            return
        attachment.restore(fused)
        if fused is None and self._is_on_denoiser:
            self.hook(denoiser)

    @property
    def _is_on_denoiser(self) -> bool:
        """Whether the adapter was attached to the denoiser itself, whose calls no pipeline sees."""
        return any(isinstance(target, nn.Module) for target in self.targets)

    def follow(self, device: torch.device) -> None:
        if next(self.parameters()).device != device:
            self.to(device)

    # The guidance scale

    @contextmanager
    def guidance_scale(self, scale: Scales) -> Iterator[None]:
        """Within it, the denoiser guides itself: one scale for all images of a batch, or one per image.

        It comes before the scale of a pipeline's call, and before what was opened around it. Other threads do not see it. A scale
        of 1 is an exact bypass, and so is one below, as in diffusers. A scale outside the trained range warns.
        """
        guidance = Guidance(as_scales(scale)[None])
        if self.denoiser is not None:
            self.check_layers(self.denoiser)
        self.warn_outside(guidance.scales)
        context = Context(guidance, next((asked for asked in self._open() if isinstance(asked, Context)), None))
        with self._asking(context), self._between_calls(context):
            yield

    @contextmanager
    def guidance_schedule(self, schedule: ScaleSchedule) -> Iterator[None]:
        """Within it, attached pipelines guide by step: an interval, a ramp. It comes before what was opened around it.

        Args:
            schedule: one entry per step, each as `guidance_scale` takes it, or a function of the step and its timestep (as the
                scheduler counts: from 1000 down) that gives one. A scale of 1 is no guidance at that step.
        """
        if not self.pipelines:
            raise UserError("a schedule of scales needs a pipeline, which knows the steps: attach the adapter to one")
        with self._asking(schedule):
            yield

    @contextmanager
    def _asking(self, asked: Asked) -> Iterator[None]:
        before = OPEN.get()
        OPEN.set((*before, (self, asked)))
        try:
            yield
        finally:
            OPEN.set(before)

    def _open(self) -> Iterator[Asked]:
        """What is open in this thread or task, the innermost first."""
        return (asked for adapter, asked in reversed(OPEN.get()) if adapter is self)

    @property
    def asked(self) -> Asked | None:
        """The innermost of what is open here, if anything is."""
        return next(self._open(), None)

    @contextmanager
    def _between_calls(self, context: Context) -> Iterator[None]:
        """Within it, calls of the denoiser that no pipeline makes are guided too. No turn is held: pipelines may be called."""
        denoiser = self.denoiser
        if denoiser is None or not (self.pipelines or attachment_of(denoiser).held):
            with self.in_force(context.guidance):
                yield
            return
        attachment = attachment_of(denoiser)
        attachment.contexts.append(context)
        self.rest(denoiser)
        try:
            with self.in_force(context.guidance, anywhere=False):
                yield
        finally:
            attachment.contexts.remove(context)
            if is_attached(denoiser) and attachment_of(denoiser) is attachment:  # else it was detached meanwhile
                self.rest(denoiser)

    def rest(self, denoiser: nn.Module) -> None:
        """Have a denoiser hold what guides between pipelines' calls: the innermost context, or what was fused."""
        attachment = attachment_of(denoiser)
        if attachment.handles and not self.goes_alone(denoiser):
            return
        with attachment.lock.alone():
            self.anywhere.guidance = attachment.resting
            if attachment.resting is not None:
                self.steer(denoiser, attachment.resting)
            elif attachment.contexts:
                self.put(denoiser, None)
                self.hook(denoiser)
            elif attachment.fused != attachment.held or attachment.held is None:
                self.put(denoiser, attachment.held)

    def goes_alone(self, denoiser: nn.Module) -> bool:
        """Whether a call has to have the denoiser, or this adapter, for itself."""
        attachment = attachment_of(denoiser)
        moves = next(self.parameters()).device != next(denoiser.parameters()).device
        fuses = self.fusible and (attachment.fused is not None or self.why_unfused(denoiser) is None)
        return self.exclusive or moves or fuses or any(is_compiled(module) for module in self._outermost())

    @contextmanager
    def guiding(self, denoiser: nn.Module, guidance: Guidance) -> Iterator[None]:
        """Within it, a denoiser guides itself so: by its own weights where they can hold the scale, else by hooks."""
        with self._turn(denoiser) as alone, self.in_force(guidance, anywhere=alone):
            try:
                self.steer(denoiser, guidance)
                yield
            finally:
                if is_attached(denoiser):
                    self.rest(denoiser)

    def go_on(self, guidance: Guidance) -> None:
        """Have hooks guide otherwise for what is left of a pipeline's call."""
        if self.anywhere.guidance is self.here.guidance:
            self.anywhere.guidance = guidance
        self.here.guidance = guidance

    @contextmanager
    def taken_out(self, denoiser: nn.Module) -> Iterator[None]:
        """Within it, a denoiser's weights are the base's own."""
        attachment = attachment_of(denoiser)
        with attachment.lock.alone():
            if attachment.fused is not None:
                self.put(denoiser, None)
            try:
                yield
            finally:
                self.rest(denoiser)

    @contextmanager
    def _turn(self, denoiser: nn.Module) -> Iterator[bool]:
        """Within it, no other thread changes what this one's call needs; whether none has a call at all."""
        attachment = attachment_of(denoiser)
        while not self.goes_alone(denoiser):
            with attachment.lock.together():
                if attachment.handles:
                    yield False
                    return
            with attachment.lock.alone():
                self.put(denoiser, None)
                self.hook(denoiser)
        with attachment.lock.alone():
            yield True

    def steer(self, denoiser: nn.Module, guidance: Guidance) -> None:
        """Fuse the scale of a guidance, or have hooks guide."""
        attachment, reason = attachment_of(denoiser), self.why_unfused(denoiser)
        if reason is None and guidance.one_scale is None:
            reason = "the images of a batch have scales of their own"
        self.fused = reason is None
        if reason is not None:
            if self.fusible:
                self.warn_once(f"the guidance is not fused, so that a pass pays for it: {reason}")
            self.put(denoiser, None)
            self.hook(denoiser)
            return
        scale = guidance.one_scale or 1.0
        wanted = (
            attachment.held if attachment.held is not None and attachment.held.guidance_scale == scale else Fused(scale)
        )
        if attachment.fused != wanted:
            self.put(denoiser, wanted)

    def warn_outside(self, scales: Tensor) -> None:
        """Say where scales lie outside the range of the training."""
        low, high = self.metadata["scale_range"]
        outside = scales[(scales != 1) & ((scales < low) | (scales > high))]
        if len(outside):
            trained = f"the range {low:g} to {high:g} that" if low < high else f"{low:g}, the one scale that"
            warn(f"guidance_scale {outside[0]:g} is outside {trained} this adapter was trained at")

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warn(message)

    # Hooks

    def hook(self, denoiser: nn.Module) -> None:
        """Add the hooks, unless they are there; the sites take a pipeline's precision."""
        attachment = attachment_of(denoiser)
        if attachment.handles:
            return
        dtype = next(denoiser.parameters()).dtype
        if self.pipelines and dtype != next(self.sites.parameters()).dtype:
            self._exact = {name: value.clone() for name, value in self.sites.state_dict().items()}
            self.sites.to(dtype=dtype)
        attachment.entrance = next((entrance_of(module) for module in self._outermost()), denoiser)
        for handle in self._hooks(denoiser, attachment.entrance):
            attachment.handles.append(handle)
        self._forget_compiled()

    def _unhook(self, denoiser: nn.Module) -> None:
        if attachment_of(denoiser).unhook():
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
        """Have what is compiled compiled again: it does not notice hooks that come later."""
        if any(is_compiled(module) for module in self._outermost()):
            torch.compiler.reset()

    def _hooks(self, denoiser: nn.Module, entrance: nn.Module) -> Iterator[RemovableHandle]:
        """Plain functions: a deep copy of the denoiser shares them, and each is compiled by itself."""
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        beneath = (lambda module: module) if entrance is denoiser else unwrapped

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            changed = self.before_forward(beneath(module), {name: given[name] for name in names if name in given})
            return None if changed is None else ((), changed)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self.after_forward(beneath(module), output)

        yield entrance.register_forward_pre_hook(before, with_kwargs=True)
        yield entrance.register_forward_hook(after, with_kwargs=True, always_call=True)
        yield from self.site_hooks(denoiser)
