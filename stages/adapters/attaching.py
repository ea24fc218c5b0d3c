"""Attaching an adapter to a denoiser or pipelines, and detaching it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from stages.adapters.attachment import attachment_of, begin_attachment, end_attachment, is_attached
from stages.adapters.call_arguments import check_pipeline
from stages.adapters.denoiser_controller import check_wrappers
from stages.adapters.guiding import Guiding
from stages.adapters.hooks import hook
from stages.adapters.one_pass import adapters_of, add_to_pipeline, remove_from_pipeline
from stages.adapters.wrappers import unwrapped
from stages.errors import UserError

Self = TypeVar("Self", bound="Attachable")


class Attachable(Guiding):
    """Attaching and detaching, the same for every variant."""

    @abstractmethod
    def check_fit(self, denoiser: nn.Module) -> None:
        """
        Raises:
            UserError: the base has other sites than the adapter.
        """

    def attach(self: Self, target: Any, backup_device: str | torch.device | None = None) -> Self:
        """Attach to a denoiser, or to a pipeline, whose `guidance_scale` then sets this adapter's scale.

        An attached pipeline runs one pass per step. An adapter can be attached to further pipelines with the same
        denoiser (image to image, inpainting, one per request of a server), and a pipeline with two denoisers takes one
        adapter for each. The adapter moves to the latents' device. It holds pipelines by weak references.

        Args:
            backup_device: where the base's own weights are kept while a scale is fused; by default on their own device.

        Raises:
            UserError: the adapter is attached already, the base has other sites than the adapter, or the pipeline
                guides by another rule than the recorded one. Nothing is attached then.
        """
        is_denoiser = isinstance(target, nn.Module)
        denoiser = unwrapped(target) if is_denoiser else self.denoiser_in(target)
        if self.denoiser is None:
            self._clear_attachment()
        elif is_denoiser or self.denoiser is not denoiser or any(pipe is target for pipe in self.pipelines):
            raise UserError("this adapter is attached already: detach it first")
        if not is_denoiser:
            check_pipeline(self.metadata, target, adapters_of(target).stock)
        check_wrappers(target if is_denoiser else getattr(target, self.component_in(target)))
        with ExitStack() as undo:
            if self.denoiser is None:
                self._attach_to_denoiser(denoiser, backup_device, undo)
            self._targets.append(weakref.ref(target))
            undo.callback(self._targets.pop)
            if not is_denoiser:
                add_to_pipeline(target, self)
                undo.callback(remove_from_pipeline, target, self)
            if is_denoiser or not self.fusible:
                hook(self, denoiser)
            undo.pop_all()
        return self

    def _attach_to_denoiser(
        self, denoiser: nn.Module, backup_device: str | torch.device | None, undo: ExitStack
    ) -> None:
        if is_attached(denoiser):
            raise UserError(
                f"this {type(denoiser).__name__} carries an adapter already (a copy carries the original's): "
                "detach that one first, or load the pipeline again"
            )
        self.check_fit(denoiser)
        undo.callback(self._clear_attachment)
        begin_attachment(denoiser, backup_device)
        undo.callback(end_attachment, denoiser)
        self._denoiser = weakref.ref(denoiser)

    def _clear_attachment(self) -> None:
        self._targets.clear()
        self._denoiser = None
        self.restore_precision()

    def detach(self) -> None:
        """Restore the base, once the calls of other threads are over.

        Raises:
            UserError: other code has changed weights that a scale is fused into.
        """
        denoiser = self.denoiser
        for pipe in self.pipelines:
            remove_from_pipeline(pipe, self)
        if denoiser is not None and is_attached(denoiser):
            with attachment_of(denoiser).lock.exclusive():
                self._clear_attachment()
                end_attachment(denoiser)
        self._clear_attachment()
