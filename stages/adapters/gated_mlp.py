"""`gated_mlp`: a small network on a site's tokens, scale, timestep and condition, with its output gated per token."""

from __future__ import annotations

from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter
from stages.adapters.conditioning import Conditions
from stages.adapters.site import Site


class GatedMLPSite(Site):
    """`sigmoid(G [h, c]) * O silu(M [h, c])` with h = A x, and O initialised to zero (the reference's gated branch)."""

    def __init__(self, width_in: int, width_out: int, hidden_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, hidden_size)
        self.inner = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, 1, bias=False)
        self.of_condition = nn.Linear(hidden_size, hidden_size + 1)
        self.up = nn.Linear(hidden_size, width_out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """Return the contributions of c to M and G."""
        inner, gate = self.of_condition(conditions.vector)[:, None].tensor_split([-1], dim=-1)
        return inner, gate

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        inner, gate = prepared
        low = self.down(tokens)
        return (self.gate(low) + gate).sigmoid() * self.up(nn.functional.silu(self.inner(low) + inner))


class GatedMLP(GuidanceAdapter):
    variant = "gated_mlp"

    def new_site(self, *shape: int) -> Site:
        return GatedMLPSite(shape[0], shape[1], self.config.hidden_size)
