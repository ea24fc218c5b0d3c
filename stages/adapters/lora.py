"""`lora`: low-rank changes of linear and convolutional layers (arXiv 2106.09685); the scale sets the gain of each rank.

At a fixed scale it is a plain LoRA, `W + B diag(g(w)) A`: it can be fused into the base's weights, and other tools load
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter
from stages.adapters.conditioning import Conditioning, Conditions, ScaleAlone
from stages.adapters.config import AdapterConfig
from stages.adapters.fusing import LowRank, why_not_fusable
from stages.adapters.layers import adaptable_layers, find_layers, shape_of
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.site import Site
from stages.adapters.sites import CONVOLUTIONS, Shape
from stages.adapters.spots import TrialFacts


class LoRASite(Site):
    """`B (A x * g)` at a layer, with B initialised to zero; A has the layer's own kernel, B is a projection.

    The gain g of each rank is a sum of the scale's curves, initially log w; conditions modulate it, if the adapter sees
    any.

    Args:
        width_in, width_out: of the layer; rank: of the change; hidden_size: of the conditioning vector, 0 without
            conditions.
        kernel: for a convolution, what follows the widths in `shape_of`; empty for a linear layer.
    """

    def __init__(
        self, width_in: int, width_out: int, rank: int, hidden_size: int, kernel: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.lora_A: Any  # linear or convolutional
        self.lora_B: Any
        if kernel:
            kind, size, stride, padding = convolution_of(kernel)
            self.lora_A = kind(width_in, rank, size, stride, padding, bias=False)
            self.lora_B = kind(rank, width_out, 1, bias=False)
        else:
            self.lora_A = nn.Linear(width_in, rank, bias=False)
            self.lora_B = nn.Linear(rank, width_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.curves = nn.Parameter(torch.tensor([[0.0], [1.0], [0.0]]).repeat(1, rank))
        self.gain = nn.Linear(hidden_size, rank) if hidden_size else None
        self.is_convolution = bool(kernel)

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        gain = conditions.curves @ self.curves
        return (gain if self.gain is None else gain * (1 + self.gain(conditions.vector)),)

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        low, (gain,) = self.lora_A(tokens), prepared
        channels = 1 if self.is_convolution else low.ndim - 1
        shape = [1] * low.ndim
        shape[0], shape[channels] = gain.shape
        return self.lora_B(low * gain.view(shape))

    def change(self, shape: Shape, tokens: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        return self(tokens, *prepared)


def convolution_of(kernel: tuple[int, ...]) -> tuple[type[Any], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return a convolution's class, kernel, strides and paddings, from what follows the widths in `shape_of`."""
    if len(kernel) == 4:
        height, width, stride, padding = kernel
        kernel = (height, width, stride, stride, padding, padding)
    axes = len(kernel) // 3
    return CONVOLUTIONS[axes - 1], kernel[:axes], kernel[axes : 2 * axes], kernel[2 * axes :]


class LoRA(GuidanceAdapter):
    variant = "lora"
    default_learning_rate = 5e-3
    default_sites = ("*",)
    default_conditions = ()
    fusible = True

    def new_site(self, *shape: int) -> Site:
        width_in, width_out, *kernel = shape
        hidden_size = self.config.hidden_size if self.config.conditions else 0
        return LoRASite(width_in, width_out, self.rank, hidden_size, tuple(kernel))

    def new_conditioning(self) -> Conditioning | ScaleAlone:
        return super().new_conditioning() if self.config.conditions else ScaleAlone(self.metadata.scale_range[1])

    @classmethod
    def candidates(cls, denoiser: nn.Module) -> dict[str, Shape]:
        return {name: shape_of(layer) for name, layer in adaptable_layers(denoiser).items()}

    @classmethod
    def find_sites(
        cls,
        denoiser: nn.Module,
        config: AdapterConfig,
        metadata: AdapterMetadata,
        seen: dict[str, TrialFacts] | None = None,
    ) -> dict[str, Shape]:
        return find_layers(denoiser, list(config.sites or []), seen)

    def why_unfused(self, denoiser: nn.Module) -> str | None:
        if self.config.conditions:
            return f"the adapter sees {', '.join(self.config.conditions)} besides the scale"
        return why_not_fusable(denoiser, list(self.shapes))

    @torch.no_grad()
    def lora_weights(self, guidance_scale: float) -> LowRank:
        """Return A and B of every layer at one scale in float32; B includes gains and guidance gain.

        Args:
            guidance_scale: above 1; at 1 there is no change.

        Returns:
            By the layer's name, on the adapter's device: A `[rank, in]` and B `[out, rank]`, of a convolution
            `[rank, in, height, width]` and `[out, rank, 1, 1]`; the layer's weight is then `W + B A`.
        """
        device = next(self.parameters()).device
        scale = torch.tensor([float(guidance_scale)], device=device)
        conditions = self.conditioning(
            self.scale_with_gain(scale), torch.zeros(1, device=device), self.conditioning.embed({})
        )
        weights = {}
        for name, site in zip(self.shapes, self.sites.values(), strict=True):
            assert isinstance(site, LoRASite)
            gain = conditions.curves @ site.curves.float()
            down, up = site.lora_A.weight.float(), site.lora_B.weight.float()
            weights[name] = down, up * gain.view(1, -1, *[1] * (up.ndim - 2))
        return weights
