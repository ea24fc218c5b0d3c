"""The base class of every adapter: its state, its attachment, and the interface that hooks and fusing use."""

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

NOT_COPIED = ("thread_state", "shared_state", "_denoiser", "_targets")  # a copy starts without them


class AdapterBase(nn.Module, ABC):
    """What hooks, fusing and calls need of an adapter of any variant.

    Attributes:
        config: the variant and its sizes, with no field open.
        shapes: the widths of each site, by name.
        metadata: the rest of the adapter's folder: conditions, trained scale range, guidance gain, base.
        fused: whether the last guided call of a pipeline ran with fused weights, without hooks.
        fusible: whether the variant is a change of weights at a fixed scale.
        exclusive: whether a forward pass changes the base, so that only one thread at a time can run it.
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
        self._full_precision: dict[str, Tensor] = {}  # the sites' weights, while they run in a pipeline's precision
        self._start_detached()

    def _start_detached(self) -> None:
        self.thread_state, self.shared_state = ThreadState(), ForwardState()
        self._denoiser: weakref.ref[nn.Module] | None = None
        self._targets: list[weakref.ref[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the attachment: a copy, or an unpickled adapter, is not attached."""
        return {name: value for name, value in vars(self).items() if name not in NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_detached()
        self.restore_precision()

    # The interface of a variant

    @property
    @abstractmethod
    def sees_negative(self) -> bool:
        """Whether the adapter sees the tokens of the unconditional pass."""

    @abstractmethod
    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        """Prepare a forward pass with these arguments; return changed arguments, or None."""

    @abstractmethod
    def after_forward(self, denoiser: nn.Module, output: Any) -> Any:
        """End a forward pass; return a changed output, or None."""

    @abstractmethod
    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook by which each site adds to its module's output."""

    @abstractmethod
    def lora_weights(self, guidance_scale: float) -> LowRank:
        """Return the change of each site's weights at one scale; only for a fusible variant."""

    @abstractmethod
    def why_unfused(self, denoiser: nn.Module) -> str | None:
        """Return why this adapter needs hooks on this denoiser; None if it can be fused."""

    # The state of a forward pass. Compiled code cannot read thread-local state, so its calls hold the exclusive lock.
    # Autograd recomputes checkpointed blocks in threads of its own, where no forward pass began. Both read
    # `shared_state`.

    @property
    def _state(self) -> ForwardState:
        return self.shared_state if torch.compiler.is_compiling() or not self.thread_state.began else self.thread_state

    @property
    def guidance(self) -> Guidance | None:
        """The guidance that hooks apply; None: they do nothing."""
        return self.shared_state.guidance if torch.compiler.is_compiling() else self.thread_state.guidance

    @property
    def prepared(self) -> Prepared | None:
        """The current forward pass's tensors for each site; None if the adapter does nothing."""
        return self._state.prepared

    @prepared.setter
    def prepared(self, prepared: Prepared | None) -> None:
        self.shared_state.prepared = prepared
        if not torch.compiler.is_compiling():
            self.thread_state.began, self.thread_state.prepared = True, prepared

    @property
    def gate(self) -> Tensor | None:
        """Which samples `[n]` of the current forward pass are guided; None if all are."""
        return self._state.gate

    @gate.setter
    def gate(self, gate: Tensor | None) -> None:
        self.shared_state.gate = gate
        if not torch.compiler.is_compiling():
            self.thread_state.began, self.thread_state.gate = True, gate

    @contextmanager
    def guided_by(self, guidance: Guidance | None, all_threads: bool = True) -> Iterator[None]:
        """Have hooks apply a guidance in this thread.

        Args:
            all_threads: also in other threads; only while no other thread can use the adapter.
        """
        before, shared_before = self.thread_state.guidance, self.shared_state.guidance
        self.thread_state.guidance = guidance
        if all_threads:
            self.shared_state.guidance = guidance
        try:
            yield
        finally:
            self.thread_state.guidance = before
            if all_threads:
                self.shared_state.guidance = shared_before

    # The attachment

    @property
    def denoiser(self) -> nn.Module | None:
        """The denoiser that the adapter is attached to, without wrappers."""
        return None if self._denoiser is None else self._denoiser()

    @property
    def targets(self) -> list[Any]:
        """The denoisers and pipelines that were passed to `attach` and still exist."""
        return [target for reference in self._targets if (target := reference()) is not None]

    @property
    def pipelines(self) -> list[Any]:
        return [target for target in self.targets if not isinstance(target, nn.Module)]

    @property
    def is_on_denoiser(self) -> bool:
        """Whether the adapter was attached to the denoiser itself, which is called without a pipeline."""
        return any(isinstance(target, nn.Module) for target in self.targets)

    def component_in(self, pipe: Any) -> str:
        """Return the pipeline's name for the denoiser that this adapter was made for.

        Raises:
            UserError: the pipeline has no such component.
        """
        recorded = self.metadata.base.denoiser_subfolder
        if isinstance(getattr(pipe, recorded, None), nn.Module):
            return recorded
        found, _ = denoiser_of(pipe)
        if recorded.rpartition("_")[2].isdigit():
            raise UserError(
                f"{type(pipe).__name__} has no {recorded}, which the adapter was made for: "
                f"attach the adapter of its {found}"
            )
        return found

    def denoiser_in(self, pipe: Any) -> nn.Module:
        """Return the pipeline's denoiser that this adapter was made for, without wrappers."""
        return unwrapped(getattr(pipe, self.component_in(pipe)))

    def wrapped_denoisers(self) -> Iterator[nn.Module]:
        """Yield the denoiser of each target as it is called, with its wrappers."""
        for target in self.targets:
            yield target if isinstance(target, nn.Module) else getattr(target, self.component_in(target))

    # Device and precision

    def move_to(self, device: torch.device) -> None:
        if next(self.parameters()).device != device:
            self.to(device)

    def match_precision(self, dtype: torch.dtype) -> None:
        """Cast the sites to a pipeline's precision."""
        if dtype != next(self.sites.parameters()).dtype:
            self._full_precision = {name: value.clone() for name, value in self.sites.state_dict().items()}
            self.sites.to(dtype=dtype)

    @torch.no_grad()
    def restore_precision(self) -> None:
        """Undo `match_precision`."""
        if self._full_precision:
            self.sites.to(dtype=next(iter(self._full_precision.values())).dtype)
            self.sites.load_state_dict(self._full_precision)
            self._full_precision = {}

    # Warnings

    def warn_outside_range(self, scales: Tensor) -> None:
        """Warn if a scale lies outside the trained range."""
        low, high = self.metadata.scale_range
        outside = scales[(scales != 1) & ((scales < low) | (scales > high))]
        if len(outside):
            trained = f"the range {low:g} to {high:g} that" if low < high else f"{low:g}, the one scale that"
            warn(f"guidance_scale {outside[0]:g} is outside {trained} this adapter was trained at")

    def warn_once(self, message: str, topic: str | None = None) -> None:
        """Warn the first time only; a topic stands for all messages on it."""
        if (topic or message) not in self.warned:
            self.warned.add(topic or message)
            warn(message)
