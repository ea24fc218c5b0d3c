"""`modulated_low_rank`: a low-rank branch on a site's own tokens, modulated by scale, timestep and condition.

What depends on the image is what closes the gap to guidance: the branch sees the tokens, and the scale turns it.
"""

from __future__ import annotations

from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter, Site


class ModulatedLowRankSite(Site):
    """`O silu(A x * (1 + g(c)) + s(c)) + b(c)`, with O and b zero at the start."""

    def __init__(self, width: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * rank)
        self.bias = nn.Linear(hidden_size, width)
        for layer in (self.up, self.bias):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.bias.bias)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        vector = nn.functional.silu(self.inner(conditioning))
        gain, shift = self.modulation(vector)[:, None].chunk(2, dim=-1)
        branch = nn.functional.silu(self.down(tokens) * (1 + gain) + shift)
        return self.up(branch) + self.bias(vector)[:, None]


class ModulatedLowRank(GuidanceAdapter):
    variant = "modulated_low_rank"

    def new_site(self, width: int) -> Site:
        return ModulatedLowRankSite(width, self.config.hidden_size, self.config.rank)
