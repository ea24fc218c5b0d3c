"""`modulated_low_rank`: a low-rank branch on a site's own tokens, modulated by scale, timestep and condition.

What depends on the image is what closes the gap to guidance: the branch sees the tokens, and the scale turns it.
"""

from __future__ import annotations

from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter, Site
from stages.adapters.conditioning import Known


class ModulatedLowRankSite(Site):
    """`O silu(A x * (1 + g(c)) + s(c)) + b(c)`, with O and b zero at the start."""

    def __init__(self, width_in: int, width_out: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * rank)
        self.bias = nn.Linear(hidden_size, width_out)
        for layer in (self.up, self.bias):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.bias.bias)

    def of_step(self, known: Known) -> tuple[Tensor, ...]:
        vector = nn.functional.silu(self.inner(known.vector))
        gain, shift = self.modulation(vector)[:, None].chunk(2, dim=-1)
        return 1 + gain, shift, self.bias(vector)[:, None]

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        gain, shift, bias = prepared
        return self.up(nn.functional.silu(self.down(tokens) * gain + shift)) + bias


class ModulatedLowRank(GuidanceAdapter):
    variant = "modulated_low_rank"
    default_sites = ("attention", "feed_forward")
    default_rank = 32

    def new_site(self, width_in: int, width_out: int) -> Site:
        return ModulatedLowRankSite(width_in, width_out, self.config.hidden_size, self.rank)
