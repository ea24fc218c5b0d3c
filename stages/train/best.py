"""The adapter of the lowest validation loss so far, which a run keeps beside its last."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.adapters.metadata import AdapterMetadata

BEST = "best"  # name of its folder


class Best(NamedTuple):
    """Weights on the CPU, with the step and the loss of their validation; a checkpoint holds them too."""

    step: int
    validation_loss: float
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, adapter: GuidanceAdapter, step: int, validation_loss: float) -> Best:
        return cls(step, validation_loss, weights_of(adapter))

    @property
    def figures(self) -> dict[str, float]:
        return {"step": self.step, "validation_loss": self.validation_loss}

    def save(self, adapter: GuidanceAdapter, metadata: AdapterMetadata, folder: Path) -> None:
        """Write the folder of `adapter` as it was at the best validation, and leave the adapter as it is."""
        weights, before = weights_of(adapter), adapter.metadata
        adapter.load_state_dict(self.weights)
        adapter.metadata = metadata
        try:
            adapter.save_pretrained(folder)
        finally:
            adapter.load_state_dict(weights)
            adapter.metadata = before


def weights_of(adapter: GuidanceAdapter) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in adapter.state_dict().items()}
