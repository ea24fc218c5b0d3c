"""Has one denoiser guide itself by an adapter: by a scale in its own weights where they can hold it, else by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.attachment import Attachment, Fused, attachment_of, is_attached
from stages.adapters.guidance import Guidance
from stages.adapters.hooks import hook, unhook
from stages.adapters.scale_overrides import ScaleOverride, innermost_override
from stages.adapters.wrappers import entrance_of, is_compiled, layers_of, runs_fused_projections
from stages.errors import UserError


class DenoiserController:
    """One adapter and the denoiser that it is attached to: all that a pipeline's call needs of either.

    Attributes:
        metadata: what the adapter's folder tells.
        sees_negative: whether the adapter knows the tokens of the unconditional pass.
    """

    def __init__(self, adapter: AdapterBase, denoiser: nn.Module) -> None:
        self._adapter, self.denoiser = adapter, denoiser
        self.metadata, self.sees_negative = adapter.metadata, adapter.sees_negative
        self.warn_outside, self.warn_once = adapter.warn_outside, adapter.warn_once

    @property
    def override(self) -> ScaleOverride | None:
        """What is open for the adapter in this thread or task: it comes before a call's scale."""
        return innermost_override(self._adapter)

    @property
    def fused_scale(self) -> float | None:
        """The scale that was fused, which guides a call that names none."""
        held = self._attachment.held
        return None if held is None else held.guidance_scale

    @property
    def _attachment(self) -> Attachment:
        return attachment_of(self.denoiser)

    # A pipeline's call

    @contextmanager
    def guiding(self, guidance: Guidance) -> Iterator[None]:
        """Within it, the denoiser guides itself so: by its own weights where they can hold the scale, else by hooks."""
        with self._turn() as alone, self._adapter.in_force(guidance, anywhere=alone):
            try:
                self.steer(guidance)
                yield
            finally:
                if is_attached(self.denoiser):
                    self.rest()

    def go_on(self, guidance: Guidance) -> None:
        """Have hooks guide otherwise for what is left of a pipeline's call."""
        adapter = self._adapter
        if adapter.anywhere.guidance is adapter.here.guidance:
            adapter.anywhere.guidance = guidance
        adapter.here.guidance = guidance

    def steer(self, guidance: Guidance) -> None:
        """Fuse the scale of a guidance, or have hooks guide."""
        attachment, adapter = self._attachment, self._adapter
        reason = adapter.why_unfused(self.denoiser)
        if reason is None and guidance.one_scale is None:
            reason = "the images of a batch have scales of their own"
        adapter.fused = reason is None
        if reason is not None:
            if adapter.fusible:
                adapter.warn_once(f"the guidance is not fused, so that a pass pays for it: {reason}")
            self.put(None)
            hook(adapter, self.denoiser)
            return
        scale = guidance.one_scale or 1.0
        wanted = (
            attachment.held if attachment.held is not None and attachment.held.guidance_scale == scale else Fused(scale)
        )
        if attachment.fused != wanted:
            self.put(wanted)

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Within it, the denoiser's weights are the base's own."""
        with self._attachment.lock.alone():
            if self._attachment.fused is not None:
                self.put(None)
            try:
                yield
            finally:
                self.rest()

    # Between the calls

    def put(self, fused: Fused | None) -> None:
        """Have the weights hold one scale, or their own values; hooks go where a scale comes, or both would guide."""
        attachment, adapter = self._attachment, self._adapter
        if fused is not None:
            unhook(adapter, self.denoiser)
        if fused is not None and fused.guidance_scale != 1:
            device = next(self.denoiser.parameters()).device
            adapter.follow(device)
            with torch.autocast(device.type, enabled=False):
                attachment.put(self.denoiser, fused, adapter.lora_weights(fused.guidance_scale))
            return
        attachment.restore(fused)
        if fused is None and adapter.is_on_denoiser:
            hook(adapter, self.denoiser)

    def hold(self, fused: Fused | None) -> None:
        """Have the weights hold one scale, or their own values, whenever no call or context asks for another."""
        with self._attachment.lock.alone():
            self.put(fused)
            self._attachment.held = fused

    def rest(self) -> None:
        """Have the denoiser hold what guides between pipelines' calls: the innermost context, or what was fused."""
        attachment, adapter = self._attachment, self._adapter
        if attachment.handles and not self._goes_alone():
            return
        with attachment.lock.alone():
            adapter.anywhere.guidance = attachment.resting
            if attachment.resting is not None:
                self.steer(attachment.resting)
            elif attachment.contexts:
                self.put(None)
                hook(adapter, self.denoiser)
            elif attachment.fused != attachment.held or attachment.held is None:
                self.put(attachment.held)

    # Turns

    def _goes_alone(self) -> bool:
        """Whether a call has to have the denoiser, or the adapter, for itself."""
        adapter, attachment = self._adapter, self._attachment
        moves = next(adapter.parameters()).device != next(self.denoiser.parameters()).device
        fuses = adapter.fusible and (attachment.fused is not None or adapter.why_unfused(self.denoiser) is None)
        return adapter.exclusive or moves or fuses or any(is_compiled(module) for module in adapter.outermost())

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Within it, no other thread changes what this one's call needs; whether none has a call at all."""
        attachment = self._attachment
        while not self._goes_alone():
            with attachment.lock.together():
                if attachment.handles:
                    yield False
                    return
            with attachment.lock.alone():
                self.put(None)
                hook(self._adapter, self.denoiser)
        with attachment.lock.alone():
            yield True

    # Checks

    def check_layers(self) -> None:
        """
        Raises:
            UserError: the denoiser runs layers that the adapter does not know.
        """
        if self._adapter.fusible and any(runs_fused_projections(module) for module in self.denoiser.modules()):
            raise UserError(
                f"this {type(self.denoiser).__name__} runs query, key and value as one layer, which the adapter does not know: "
                "unfuse_qkv_projections() first"
            )

    def check_carried(self, outermost: nn.Module) -> None:
        """
        Args:
            outermost: the denoiser as the pipeline that is about to run calls it.

        Raises:
            UserError: the denoiser does not carry the adapter, or runs in a way it does not know.
        """
        kind = type(self.denoiser).__name__
        if not is_attached(self.denoiser):
            raise UserError(
                f"this {kind} took the place of the one that the adapter was attached to, or the adapter was detached meanwhile: "
                "detach it, and attach it anew"
            )
        self.check_layers()
        self._come_by(outermost)

    def _come_by(self, outermost: nn.Module) -> None:
        """Have the hooks see the calls of a denoiser that was wrapped since they were put there."""
        check_wrappers(outermost)
        attachment = self._attachment
        if attachment.handles and attachment.entrance is not entrance_of(outermost):
            with attachment.lock.alone():
                attachment.unhook()
                hook(self._adapter, self.denoiser)


def controllers_of(pipe: Any, adapters: Iterable[AdapterBase]) -> dict[str, DenoiserController]:
    """The controller of each denoiser of a pipeline that is about to run, by the component's name.

    Raises:
        UserError: a denoiser does not carry its adapter, or runs in a way it does not know.
    """
    controllers = {adapter.component_in(pipe): controller_in(pipe, adapter) for adapter in adapters}
    for component, controller in controllers.items():
        controller.check_carried(getattr(pipe, component))
    return controllers


def controller_in(pipe: Any, adapter: AdapterBase) -> DenoiserController:
    """Of the denoiser of a pipeline that an adapter was made for."""
    return DenoiserController(adapter, adapter.denoiser_in(pipe))


def check_wrappers(module: nn.Module) -> None:
    """
    Raises:
        UserError: what wraps a denoiser calls copies of it in threads of its own.
    """
    for layer in layers_of(module):
        if isinstance(layer, nn.DataParallel) and len(layer.device_ids) > 1:
            raise UserError(
                "DataParallel runs copies of the denoiser, which carry no adapter: use its `module` alone, or one process per GPU"
            )
