"""`offset`: adds a vector per site from scale, timestep and condition, for all tokens (the reference's "additive")."""

from __future__ import annotations

from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter
from stages.adapters.conditioning import Conditions
from stages.adapters.site import Site


class OffsetSite(Site):
    """`b(c)`, the same for every token."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        return (self.outer(nn.functional.silu(self.inner(conditions.vector)))[:, None],)

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        return prepared[0]


class Offset(GuidanceAdapter):
    variant = "offset"

    def new_site(self, *shape: int) -> Site:
        return OffsetSite(shape[1], self.config.hidden_size)
