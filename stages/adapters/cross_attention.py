"""`cross_attention`: a site's tokens attend to scale, timestep and condition (the reference's default for UNets)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.adapters.adapter import GuidanceAdapter
from stages.adapters.conditioning import Conditions
from stages.adapters.site import Site

HEAD_WIDTH = 64


class CrossAttentionSite(Site):
    """`O attention(Q x, K c, V c)`; c holds tokens for scale, timestep, whole conditions and the prompt.

    There are no position embeddings, so prompts may have any length. O is initialised to zero.
    """

    def __init__(self, width_in: int, width_out: int, hidden_size: int) -> None:
        super().__init__()
        self.heads = max(1, hidden_size // HEAD_WIDTH)
        self.norm = nn.LayerNorm(width_in)
        self.query = nn.Linear(width_in, hidden_size, bias=False)
        self.of_condition = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, width_out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        return self._keys_and_values(conditions.parts)

    def prepare_tokens(self, conditions: Conditions) -> tuple[Tensor, ...]:
        if conditions.tokens is None:
            return ()
        mask = () if conditions.mask is None else (conditions.mask,)
        return (*self._keys_and_values(conditions.tokens), *mask)

    def _keys_and_values(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values `[n, heads, length, width]`."""
        both = self.of_condition(nn.functional.silu(condition))
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in both.chunk(2, dim=-1))

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        keys, values, *of_tokens = prepared
        mask = None
        if of_tokens:
            mask = of_tokens[2] if len(of_tokens) == 3 else None
            if mask is not None:  # scale, timestep and whole conditions are never masked
                mask = nn.functional.pad(mask, (keys.shape[2], 0), value=True)[:, None, None]
            keys, values = torch.cat([keys, of_tokens[0]], 2), torch.cat([values, of_tokens[1]], 2)
        queries = self.query(self.norm(tokens)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class CrossAttention(GuidanceAdapter):
    variant = "cross_attention"
    default_conditions = ("timestep", "pooled", "tokens")

    def new_site(self, *shape: int) -> Site:
        return CrossAttentionSite(shape[0], shape[1], self.config.hidden_size)
