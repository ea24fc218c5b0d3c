"""The trained part: one file per variant, the contract they share, and how they ride on a frozen denoiser."""

from stages.adapters.adapter import AdapterConfig, GuidanceAdapter
from stages.adapters.modulated_low_rank import ModulatedLowRank
from stages.adapters.offset import Offset

__all__ = ["AdapterConfig", "GuidanceAdapter", "ModulatedLowRank", "Offset"]
