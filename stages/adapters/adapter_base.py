"""The base of every adapter: its state while it guides, what it is attached to, and what hooks and fusing need of a variant."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.config import AdapterConfig
from stages.adapters.fusing import LowRank
from stages.adapters.guidance import ForwardState, Guidance, Prepared, ThreadState
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.sites import Shape
from stages.adapters.user_warnings import warn
from stages.adapters.wrappers import unwrapped
from stages.base.denoiser import denoiser_of
from stages.errors import UserError

NOT_COPIED = ("thread_state", "shared_state", "_denoiser", "_targets")  # what no copy of an adapter has of its original


class AdapterBase(nn.Module, ABC):
    """What hooks, fusing and calls need of an adapter, whatever its variant.

    Attributes:
        config: the variant and its sizes, complete.
        shapes: the sites by name, with the widths of each.
        metadata: what the adapter's folder tells: conditions, trained scale range, guidance gain, base.
        fused: whether the last guided call of a pipeline ran the base's own modules alone.
        fusible: whether the variant is a change of weights at one scale.
        exclusive: whether it changes the base in a forward pass, so that one thread at a time can call it.
    """

    variant: ClassVar[str]
    fusible: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False
    sites: nn.ModuleDict

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], metadata: AdapterMetadata) -> None:
        super().__init__()
        self.config, self.shapes, self.metadata = config, shapes, metadata
        self.fused: bool | None = None
        self.warned: set[str] = set()
        self._full_precision: dict[str, Tensor] = {}  # the sites' weights, while they have a pipeline's precision
        self._start_detached()

    def _start_detached(self) -> None:
        self.thread_state, self.shared_state = ThreadState(), ForwardState()
        self._denoiser: weakref.ref[nn.Module] | None = None
        self._targets: list[weakref.ref[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an adapter, or one from another process, is attached to nothing."""
        return {name: value for name, value in vars(self).items() if name not in NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_detached()
        self.restore_precision()

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
    # again in threads of its own, where no forward pass began. Both find what they need in `shared_state`.

    @property
    def _state(self) -> ForwardState:
        return self.shared_state if torch.compiler.is_compiling() or not self.thread_state.began else self.thread_state

    @property
    def guidance(self) -> Guidance | None:
        """At which hooks guide."""
        return self.shared_state.guidance if torch.compiler.is_compiling() else self.thread_state.guidance

    @property
    def prepared(self) -> Prepared | None:
        """Of the forward pass under way."""
        return self._state.prepared

    @prepared.setter
    def prepared(self, prepared: Prepared | None) -> None:
        self.shared_state.prepared = prepared
        if not torch.compiler.is_compiling():
            self.thread_state.began, self.thread_state.prepared = True, prepared

    @property
    def gate(self) -> Tensor | None:
        """Of the forward pass under way."""
        return self._state.gate

    @gate.setter
    def gate(self, gate: Tensor | None) -> None:
        self.shared_state.gate = gate
        if not torch.compiler.is_compiling():
            self.thread_state.began, self.thread_state.gate = True, gate

    @contextmanager
    def guided_by(self, guidance: Guidance | None, all_threads: bool = True) -> Iterator[None]:
        """Within it, hooks guide so in this thread; anywhere else too, where nobody else can be using the adapter."""
        before, elsewhere = self.thread_state.guidance, self.shared_state.guidance
        self.thread_state.guidance = guidance
        if all_threads:
            self.shared_state.guidance = guidance
        try:
            yield
        finally:
            self.thread_state.guidance = before
            if all_threads:
                self.shared_state.guidance = elsewhere

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

    @property
    def is_on_denoiser(self) -> bool:
        """Whether the adapter was attached to the denoiser itself, whose calls no pipeline sees."""
        return any(isinstance(target, nn.Module) for target in self.targets)

    def component_in(self, pipe: Any) -> str:
        """What a pipeline calls the denoiser that this adapter was made for.

        Raises:
            UserError: it has no such part.
        """
        recorded = self.metadata.base.denoiser_subfolder
        if isinstance(getattr(pipe, recorded, None), nn.Module):
            return recorded
        found, _ = denoiser_of(pipe)
        if recorded.rpartition("_")[2].isdigit():
            raise UserError(
                f"{type(pipe).__name__} has no {recorded}, which the adapter was made for: attach the adapter of its {found}"
            )
        return found

    def denoiser_in(self, pipe: Any) -> nn.Module:
        """The denoiser of a pipeline that this adapter was made for, whatever wraps it."""
        return unwrapped(getattr(pipe, self.component_in(pipe)))

    def wrapped_denoisers(self) -> Iterator[nn.Module]:
        """The denoiser as its callers know it, in whatever wraps it."""
        for target in self.targets:
            yield target if isinstance(target, nn.Module) else getattr(target, self.component_in(target))

    # Where its own weights are, and in which precision

    def move_to(self, device: torch.device) -> None:
        if next(self.parameters()).device != device:
            self.to(device)

    def match_precision(self, dtype: torch.dtype) -> None:
        """Have the sites compute in a pipeline's precision."""
        if dtype != next(self.sites.parameters()).dtype:
            self._full_precision = {name: value.clone() for name, value in self.sites.state_dict().items()}
            self.sites.to(dtype=dtype)

    @torch.no_grad()
    def restore_precision(self) -> None:
        """Give the sites the precision back that they had before hooks took the pipeline's."""
        if self._full_precision:
            self.sites.to(dtype=next(iter(self._full_precision.values())).dtype)
            self.sites.load_state_dict(self._full_precision)
            self._full_precision = {}

    # Warnings

    def warn_outside_range(self, scales: Tensor) -> None:
        """Say where scales lie outside the range of the training."""
        low, high = self.metadata.scale_range
        outside = scales[(scales != 1) & ((scales < low) | (scales > high))]
        if len(outside):
            trained = f"the range {low:g} to {high:g} that" if low < high else f"{low:g}, the one scale that"
            warn(f"guidance_scale {outside[0]:g} is outside {trained} this adapter was trained at")

    def warn_once(self, message: str, topic: str | None = None) -> None:
        """Warn, but for the first time only: by its text, or by its topic."""
        if (topic or message) not in self.warned:
            self.warned.add(topic or message)
            warn(message)
