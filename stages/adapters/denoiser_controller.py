"""Guides one denoiser by an adapter: by fused weights where possible, else by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.adapters.adapter_base import AdapterBase
from stages.adapters.attachment import Attachment, Fusion, attachment_of, is_attached
from stages.adapters.guidance import Guidance
from stages.adapters.hooks import hook, unhook
from stages.adapters.scale_overrides import ScaleOverride, innermost_override
from stages.adapters.wrappers import hookable_module, is_compiled, runs_fused_projections, wrappers_of
from stages.errors import UserError


class DenoiserController:
    """One adapter and the denoiser it is attached to: the interface that a pipeline's call uses.

    Attributes:
        metadata: the adapter's.
        sees_negative: whether the adapter sees the tokens of the unconditional pass.
    """

    def __init__(self, adapter: AdapterBase, denoiser: nn.Module) -> None:
        self._adapter, self.denoiser = adapter, denoiser
        self.metadata, self.sees_negative = adapter.metadata, adapter.sees_negative
        self.warn_outside_range, self.warn_once = adapter.warn_outside_range, adapter.warn_once

    @property
    def override(self) -> ScaleOverride | None:
        """The innermost override that this thread or task has opened; it precedes a call's scale."""
        return innermost_override(self._adapter)

    @property
    def fused_scale(self) -> float | None:
        """The scale set by `fuse`, for a call that names none."""
        fusion = self._attachment.default_fusion
        return None if fusion is None else fusion.guidance_scale

    @property
    def _attachment(self) -> Attachment:
        return attachment_of(self.denoiser)

    # A pipeline's call

    @contextmanager
    def guiding(self, guidance: Guidance) -> Iterator[None]:
        """Guide the denoiser within the context: by fused weights where possible, else by hooks."""
        with self._locked() as exclusive, self._adapter.guided_by(guidance, all_threads=exclusive):
            try:
                self.apply(guidance)
                yield
            finally:
                if is_attached(self.denoiser):
                    self.restore_idle()

    def set_guidance(self, guidance: Guidance) -> None:
        """Have hooks apply another guidance for the rest of the call."""
        adapter = self._adapter
        if adapter.shared_state.guidance is adapter.thread_state.guidance:
            adapter.shared_state.guidance = guidance
        adapter.thread_state.guidance = guidance

    def apply(self, guidance: Guidance) -> None:
        """Fuse the scale of a guidance, or add the hooks that apply it."""
        attachment, adapter = self._attachment, self._adapter
        reason = adapter.why_unfused(self.denoiser)
        if reason is None and guidance.one_scale is None:
            reason = "the images of a batch have scales of their own"
        adapter.fused = reason is None
        if reason is not None:
            if adapter.fusible:
                adapter.warn_once(f"the guidance is not fused, so each pass costs more: {reason}")
            self.set_fusion(None)
            hook(adapter, self.denoiser)
            return
        scale = guidance.one_scale or 1.0
        default = attachment.default_fusion
        wanted = default if default is not None and default.guidance_scale == scale else Fusion(scale)
        if attachment.fusion != wanted:
            self.set_fusion(wanted)

    @contextmanager
    def unfused(self) -> Iterator[None]:
        """Restore the base's own weights within the context."""
        with self._attachment.lock.exclusive():
            if self._attachment.fusion is not None:
                self.set_fusion(None)
            try:
                yield
            finally:
                self.restore_idle()

    # Between the calls

    def set_fusion(self, fusion: Fusion | None) -> None:
        """Fuse one scale, or restore the base's weights. A fusion removes the hooks, or both would guide."""
        attachment, adapter = self._attachment, self._adapter
        if fusion is not None:
            unhook(adapter, self.denoiser)
        if fusion is not None and fusion.guidance_scale != 1:
            device = next(self.denoiser.parameters()).device
            adapter.move_to(device)
            with torch.autocast(device.type, enabled=False):
                attachment.fuse(self.denoiser, fusion, adapter.lora_weights(fusion.guidance_scale))
            return
        attachment.restore(fusion)
        if fusion is None and adapter.is_on_denoiser:
            hook(adapter, self.denoiser)

    def set_default_fusion(self, fusion: Fusion | None) -> None:
        """Set what is fused whenever no call or context requests another scale."""
        with self._attachment.lock.exclusive():
            self.set_fusion(fusion)
            self._attachment.default_fusion = fusion

    def restore_idle(self) -> None:
        """Apply what guides between pipelines' calls: the innermost context, or the default fusion."""
        attachment, adapter = self._attachment, self._adapter
        if attachment.handles and not self._needs_exclusive_lock():
            return
        with attachment.lock.exclusive():
            adapter.shared_state.guidance = attachment.idle_guidance
            if attachment.idle_guidance is not None:
                self.apply(attachment.idle_guidance)
            elif attachment.contexts:
                self.set_fusion(None)
                hook(adapter, self.denoiser)
            elif attachment.fusion != attachment.default_fusion or attachment.default_fusion is None:
                self.set_fusion(attachment.default_fusion)

    # The lock

    def _needs_exclusive_lock(self) -> bool:
        """Whether a call changes the denoiser or the adapter, or runs compiled code."""
        adapter, attachment = self._adapter, self._attachment
        moves = next(adapter.parameters()).device != next(self.denoiser.parameters()).device
        fuses = adapter.fusible and (attachment.fusion is not None or adapter.why_unfused(self.denoiser) is None)
        return adapter.exclusive or moves or fuses or any(is_compiled(module) for module in adapter.wrapped_denoisers())

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the lock that a call needs; yield whether it is exclusive."""
        attachment = self._attachment
        while not self._needs_exclusive_lock():
            with attachment.lock.shared():
                if attachment.handles:
                    yield False
                    return
            with attachment.lock.exclusive():
                self.set_fusion(None)
                hook(self._adapter, self.denoiser)
        with attachment.lock.exclusive():
            yield True

    # Checks

    def check_layers(self) -> None:
        """
        Raises:
            UserError: the denoiser runs fused projections, which are not among the adapter's sites.
        """
        if self._adapter.fusible and any(runs_fused_projections(module) for module in self.denoiser.modules()):
            raise UserError(
                f"this {type(self.denoiser).__name__} runs query, key and value as one layer, which is not among the "
                "adapter's sites: call unfuse_qkv_projections() first"
            )

    def check_attached(self, outermost: nn.Module) -> None:
        """
        Args:
            outermost: the denoiser with its wrappers, as the pipeline calls it.

        Raises:
            UserError: the adapter is not attached to the denoiser, or cannot guide it as it runs.
        """
        kind = type(self.denoiser).__name__
        if not is_attached(self.denoiser):
            raise UserError(
                f"the adapter is not attached to this {kind}: the pipeline's denoiser was replaced, or the adapter was "
                "detached meanwhile: detach it, and attach it again"
            )
        self.check_layers()
        self._rehook(outermost)

    def _rehook(self, outermost: nn.Module) -> None:
        """Move the hooks if the denoiser was wrapped after they were added."""
        check_wrappers(outermost)
        attachment = self._attachment
        if attachment.handles and attachment.hooked_module is not hookable_module(outermost):
            with attachment.lock.exclusive():
                attachment.unhook()
                hook(self._adapter, self.denoiser)


def controllers_of(pipe: Any, adapters: Iterable[AdapterBase]) -> dict[str, DenoiserController]:
    """Return the controller of each guided denoiser of a pipeline, by component name.

    Raises:
        UserError: an adapter is not attached to its denoiser, or cannot guide it as it runs.
    """
    controllers = {adapter.component_in(pipe): controller_in(pipe, adapter) for adapter in adapters}
    for component, controller in controllers.items():
        controller.check_attached(getattr(pipe, component))
    return controllers


def controller_in(pipe: Any, adapter: AdapterBase) -> DenoiserController:
    """Return the controller of the pipeline's denoiser that an adapter was made for."""
    return DenoiserController(adapter, adapter.denoiser_in(pipe))


def check_wrappers(module: nn.Module) -> None:
    """
    Raises:
        UserError: a wrapper runs copies of the denoiser in threads of its own.
    """
    for layer in wrappers_of(module):
        if isinstance(layer, nn.DataParallel) and len(layer.device_ids) > 1:
            raise UserError(
                "DataParallel runs copies of the denoiser, which carry no adapter: use its `module`, or one process "
                "per GPU"
            )
