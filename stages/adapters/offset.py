"""`offset`: a vector per site from scale, timestep and condition; blind to the image (the reference's simplest kind)."""

from __future__ import annotations

from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter, Site


class OffsetSite(Site):
    """`b(c)`, the same for every token."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        return self.outer(nn.functional.silu(self.inner(conditioning)))[:, None]


class Offset(GuidanceAdapter):
    variant = "offset"

    def new_site(self, width: int) -> Site:
        return OffsetSite(width, self.config.hidden_size)
