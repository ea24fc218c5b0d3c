"""What an adapter has put on a denoiser: hooks on its modules, or one scale in its weights."""

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

ATTACHMENT = "_guidance_attachment"  # among a denoiser's attributes


@dataclass(frozen=True)
class Fusion:
    """What weights hold: the change at one scale, so many times."""

    guidance_scale: float
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Context:
    """A scale that is in force between pipelines' calls, inside another one or none."""

    guidance: Guidance
    outer: Context | None


class ReadersWriterLock:
    """Whose turn it is on a denoiser: who changes its weights goes alone, those who leave them as they are go together.

    A thread that has its turn may take it once more, also alone within alone, or together within alone.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._exclusive: list[int] = []  # the thread that goes alone, as often as it does
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
        """Begin to go together."""
        thread = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: {*self._exclusive} <= {thread})
            self._shared[thread] += 1

    def release_shared(self) -> None:
        """End what `join` began."""
        with self._condition:
            self._shared[threading.get_ident()] -= 1
            self._shared += Counter()  # leaves out who does not go any more
            self._condition.notify_all()


class Attachment:
    """It lies on the denoiser itself, so that a deep copy of the denoiser has one of its own.

    Attributes:
        guards: of the hooks by which calls that no adapter guides wait for those that change the weights.
        handles: of the hooks that guide; hooked_module: the module whose call they see, a wrapper around the denoiser perhaps.
        fusion: what the weights hold; None where they are the base's own.
        default_fusion: what they hold between calls, because somebody fused it.
        contexts: open, in the order of opening, whatever thread opened them.
        lock: of those that use the denoiser.
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
        """A copy takes turns with its original, because the adapter that rides on both moves between their devices."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared_with_original = {"contexts": [], "lock": self.lock}
        own = {name: value for name, value in vars(self).items() if name not in shared_with_original}
        vars(copied).update(copy.deepcopy(own, memo), **shared_with_original)
        return copied

    @property
    def idle_guidance(self) -> Guidance | None:
        """What guides between pipelines' calls; None where that differs from thread to thread, or nothing does."""
        nested = all(inner.outer is outer for outer, inner in pairwise(self.contexts))
        return self.contexts[-1].guidance if self.contexts and nested else None

    def fuse(self, denoiser: nn.Module, fusion: Fusion, change: LowRank) -> None:
        """Fuse; interrupted, the base's own weights are back."""
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
        """The base's own weights, which is also what a scale of 1 holds."""
        if self.weights is not None:
            self.weights.restore()
        self.weights, self.fusion = None, fusion

    def unhook(self) -> bool:
        """Whether there were hooks."""
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
    """Pipelines that carry no adapter may share a denoiser: none of their passes runs on weights that a scale is in."""
    if not torch.compiler.is_compiling():  # compiled code knows no threads
        attachment_of(denoiser).lock.acquire_shared()


class ReleaseLock:
    """The first of a ridden denoiser's hooks, so that it says why the denoiser cannot be pickled. Copies share it."""

    def __call__(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            attachment_of(denoiser).lock.release_shared()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReleaseLock:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "a denoiser that carries an adapter cannot be pickled: detach the adapter first, and attach it anew there"
        )


def end_attachment(denoiser: nn.Module) -> None:
    """Leave a denoiser as it was."""
    attachment = attachment_of(denoiser)
    attachment.unhook()
    for handle in attachment.guards:
        handle.remove()
    del vars(denoiser)[ATTACHMENT]
    attachment.restore()


def is_attached(denoiser: nn.Module) -> bool:
    """Whether an adapter rides on it; a deep copy has a ride of its own."""
    return ATTACHMENT in vars(denoiser)


def attachment_of(denoiser: nn.Module) -> Attachment:
    attachment = vars(denoiser)[ATTACHMENT]
    assert isinstance(attachment, Attachment)
    return attachment
