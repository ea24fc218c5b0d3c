"""The recipe of the teacher that draws emoji, which its scripts share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LATENT_CHANNELS = 16


@dataclass
class Recipe:
    """Steps, batch sizes and rates of each part's training, the sizes of the parts, and the folders."""

    seed: int = 0
    vae_steps: int = 3500
    vae_batch_size: int = 16
    vae_learning_rate: float = 1.5e-3
    decoder_steps: int = 6000
    copies: int = 16
    steps: int = 14000
    batch_size: int = 64
    learning_rate: float = 1e-3
    layers: int = 4
    heads: int = 4
    patch_size: int = 2
    text_width: int = 128
    text_layers: int = 3
    vocabulary: int = 2000
    device: str = "cpu"
    cache_dir: str = "emoji_cache"
    output_dir: str = str(HERE / "emoji")
