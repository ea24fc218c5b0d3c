"""An adapter's options: variant, sites, conditions and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from stages.configuration.options import option

TIMESTEP, POOLED, TOKENS, NEGATIVE_TOKENS = "timestep", "pooled", "tokens", "negative_tokens"


@dataclass
class AdapterConfig:
    variant: str = option("lora", "kind of adapter")
    sites: list[str] | None = option(
        None,
        "attention, feed_forward, of lora conditioning and convolution too, or patterns of module names such as "
        "down_blocks.*.attn2; by default the variant's own, of lora every layer",
    )
    conditions: list[str] | None = option(
        None,
        "what it sees besides the scale: timestep, pooled (a class, pooled text, or else the mean of the tokens), "
        "tokens, negative_tokens; by default the variant's own",
    )
    hidden_size: int = option(128, "width of the conditioning vector", at_least=1)
    rank: int | None = option(None, "rank of a low-rank branch; by default the variant's own", at_least=1)
