"""`positional_offset`: an offset with a learned part per token position, weighed by scale, timestep and condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter, Site
from stages.adapters.conditioning import Known

POSITIONS = 1024  # along the sequence; one of another length reads between them


class PositionalOffsetSite(Site):
    """`b(c) + O (P * (1 + g(c)))`, where row i of P `[positions, rank]` belongs to token i; b and O zero at the start."""

    def __init__(self, width: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(POSITIONS, rank))
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.gain = nn.Linear(hidden_size, rank)
        self.bias = nn.Linear(hidden_size, width)
        self.up = nn.Linear(rank, width, bias=False)
        for layer in (self.up, self.bias):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.bias.bias)

    def of_step(self, known: Known) -> tuple[Tensor, ...]:
        vector = nn.functional.silu(self.inner(known.vector))
        return self.gain(vector)[:, None], self.bias(vector)[:, None]

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        gain, bias = prepared
        rows = self.positions.T[None]
        if tokens.shape[1] != POSITIONS:
            rows = nn.functional.interpolate(rows, tokens.shape[1], mode="linear", align_corners=False)
        return self.up(rows.mT * (1 + gain)) + bias


class PositionalOffset(GuidanceAdapter):
    variant = "positional_offset"

    def new_site(self, width_in: int, width_out: int) -> Site:
        return PositionalOffsetSite(width_out, self.config.hidden_size, self.rank)
