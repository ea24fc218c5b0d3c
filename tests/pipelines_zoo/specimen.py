"""A specimen of the zoo: how to build a tiny pipeline, and the arguments of its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stages.base.sampling import Condition

PROMPTS: tuple[Condition, ...] = ({"prompt": "a bold seven leaning right"}, {"prompt": "a thin zero"})


@dataclass(frozen=True)
class Specimen:
    """A pipeline of diffusers with random weights, small enough to run in a second.

    Attributes:
        make: builds it, with torch's global random numbers.
        arguments: of its call besides conditions, steps and scale: small images, short prompts.
        conditions: of two samples.
        shifted: whether its scheduler's timesteps can be shifted.
    """

    make: Callable[[], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = PROMPTS
    shifted: bool = True

    def build(self) -> Any:
        """Build the pipeline without progress bars, and with the same weights each time."""
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save(self, folder: Path) -> Path:
        self.build().save_pretrained(folder)
        return folder
