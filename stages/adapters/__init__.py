"""The adapters: one file per variant, their common contract, and how they attach to a frozen denoiser."""

from stages.adapters.adapter import GuidanceAdapter
from stages.adapters.config import AdapterConfig
from stages.adapters.cross_attention import CrossAttention
from stages.adapters.embedding import Embedding
from stages.adapters.full import Full
from stages.adapters.gated_mlp import GatedMLP
from stages.adapters.lora import LoRA
from stages.adapters.offset import Offset

__all__ = [
    "AdapterConfig",
    "CrossAttention",
    "Embedding",
    "Full",
    "GatedMLP",
    "GuidanceAdapter",
    "LoRA",
    "Offset",
]
