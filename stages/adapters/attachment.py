"""An adapter's attachment to a denoiser: hooks, fused weights, and the lock that calls share."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.fusing import FusedWeights, LowRank
from stages.adapters.guidance import Guidance
from stages.errors import UserError

ATTACHMENT = "_guidance_attachment"  # the denoiser's attribute that holds it


@dataclass(frozen=True)
class Fusion:
    """The scale that is fused into the weights; its change is multiplied by the strength."""

    guidance_scale: float
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Context:
    """An open `guidance_scale` context, and the one around it."""

    guidance: Guidance
    outer: Context | None


class ReadersWriterLock:
    """A readers-writer lock on a denoiser: fused calls write its weights and run alone; hooked calls share it.

    The lock is reentrant: a thread that holds it exclusively may acquire it again, shared or exclusively.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._exclusive: list[int] = []  # the thread that holds it, once for each time
        self._shared: Counter[int] = Counter()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: {*self._exclusive, *self._shared} <= {thread})
            self._exclusive.append(thread)
        try:
            yield
        finally:
            with self._condition:
                self._exclusive.pop()
                self._condition.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        self.acquire_shared()
        try:
            yield
        finally:
            self.release_shared()

    def acquire_shared(self) -> None:
        """Acquire the lock beside other readers."""
        thread = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: {*self._exclusive} <= {thread})
            self._shared[thread] += 1

    def release_shared(self) -> None:
        """Undo one `acquire_shared` of this thread."""
        with self._condition:
            self._shared[threading.get_ident()] -= 1
            self._shared += Counter()  # drops threads at zero
            self._condition.notify_all()


class Attachment:
    """The state that an adapter keeps on a denoiser, so that a deep copy of the denoiser has its own.

    Attributes:
        guards: handles of the hooks that acquire the lock for each call, guided or not.
        handles: of the hooks that guide; hooked_module: the module that has them, the denoiser or a wrapper around it.
        fusion: what is fused into the weights; None while they are the base's own.
        default_fusion: what `fuse` has set for the time between calls.
        contexts: the open contexts of all threads, in the order of opening.
        lock: shared by all calls of the denoiser.
    """

    def __init__(self, backup_device: str | torch.device | None) -> None:
        self.backup_device = backup_device
        self.guards: list[RemovableHandle] = []
        self.handles: list[RemovableHandle] = []
        self.hooked_module: nn.Module | None = None
        self.fusion: Fusion | None = None
        self.default_fusion: Fusion | None = None
        self.contexts: list[Context] = []
        self.weights: FusedWeights | None = None
        self.lock = ReadersWriterLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Share the original's lock, because the adapter of both moves between their devices."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared_with_original = {"contexts": [], "lock": self.lock}
        own = {name: value for name, value in vars(self).items() if name not in shared_with_original}
        vars(copied).update(copy.deepcopy(own, memo), **shared_with_original)
        return copied

    @property
    def idle_guidance(self) -> Guidance | None:
        """The guidance between pipelines' calls; None if threads differ, or no context is open."""
        nested = all(inner.outer is outer for outer, inner in pairwise(self.contexts))
        return self.contexts[-1].guidance if self.contexts and nested else None

    def fuse(self, denoiser: nn.Module, fusion: Fusion, change: LowRank) -> None:
        """Fuse a change; an interruption restores the base's own weights."""
        self.weights = self.weights or FusedWeights(denoiser, list(change), self.backup_device)
        self.weights.check_unchanged()
        try:
            self.weights.fuse(change, fusion.strength)
        except BaseException:
            self.weights.write_originals()
            self.weights = self.fusion = None
            raise
        self.fusion = fusion

    def restore(self, fusion: Fusion | None = None) -> None:
        """Restore the base's own weights, which a fusion at scale 1 has too."""
        if self.weights is not None:
            self.weights.restore()
        self.weights, self.fusion = None, fusion

    def unhook(self) -> bool:
        """Remove the hooks; return whether there were any."""
        hooked = bool(self.handles)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        return hooked


def begin_attachment(denoiser: nn.Module, backup_device: str | torch.device | None) -> None:
    attachment = vars(denoiser)[ATTACHMENT] = Attachment(backup_device)
    attachment.guards.append(denoiser.register_forward_pre_hook(wait_for_lock))
    attachment.guards.append(denoiser.register_forward_hook(ReleaseLock(), always_call=True))


def wait_for_lock(denoiser: nn.Module, args: Any) -> None:
    """Keep passes of pipelines without an adapter, which may share the denoiser, off fused weights."""
    if not torch.compiler.is_compiling():  # compiled code cannot lock
        attachment_of(denoiser).lock.acquire_shared()


class ReleaseLock:
    """The first hook of an attached denoiser: pickling reaches it first and gets a reason. Copies share it."""

    def __call__(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            attachment_of(denoiser).lock.release_shared()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReleaseLock:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "a denoiser that carries an adapter cannot be pickled: detach the adapter first, and attach it again after "
            "loading"
        )


def end_attachment(denoiser: nn.Module) -> None:
    """Restore a denoiser."""
    attachment = attachment_of(denoiser)
    attachment.unhook()
    for handle in attachment.guards:
        handle.remove()
    del vars(denoiser)[ATTACHMENT]
    attachment.restore()


def is_attached(denoiser: nn.Module) -> bool:
    """Whether an adapter is attached; a deep copy has an attachment of its own."""
    return ATTACHMENT in vars(denoiser)


def attachment_of(denoiser: nn.Module) -> Attachment:
    attachment = vars(denoiser)[ATTACHMENT]
    assert isinstance(attachment, Attachment)
    return attachment
