"""Sites: the modules of a denoiser whose output an adapter adds to. One rule finds them in every family."""

from __future__ import annotations

from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from stages.errors import UserError

ATTENTION, FEED_FORWARD = "attention", "feed_forward"


def find_sites(denoiser: nn.Module, kinds: list[str]) -> dict[str, int]:
    """Names of the sites of the given kinds, in the order of the denoiser, each with the width of its output.

    A block's attention site is its cross-attention where it has one, else its self-attention (the reference recipe's
    rule); its feed-forward site is its feed-forward network.
    """
    if not kinds:
        raise UserError(f"adapter.sites: empty: name {ATTENTION}, {FEED_FORWARD} or both")
    if unknown := set(kinds) - {ATTENTION, FEED_FORWARD}:
        raise UserError(f"adapter.sites: unknown kind {sorted(unknown)[0]}: one of {ATTENTION}, {FEED_FORWARD}")
    sites: dict[str, int] = {}
    for block_name, block in denoiser.named_modules():
        attentions = {n: m for n, m in block.named_children() if isinstance(m, (Attention, AttentionModuleMixin))}
        if ATTENTION in kinds and attentions:
            crossing = [n for n, m in attentions.items() if getattr(m, "is_cross_attention", False)]
            chosen = crossing[0] if crossing else next(iter(attentions))
            sites[f"{block_name}.{chosen}"] = attentions[chosen].out_dim
        for name, module in block.named_children():
            if FEED_FORWARD in kinds and isinstance(module, FeedForward):
                sites[f"{block_name}.{name}"] = width_of_feed_forward(module)
    if not sites:
        raise UserError(f"{type(denoiser).__name__}: no site of the kinds {', '.join(kinds)} was found in it")
    return sites


def width_of_feed_forward(module: FeedForward) -> int:
    """Width of the last linear layer of a feed-forward network."""
    return [layer for layer in module.net if isinstance(layer, nn.Linear)][-1].out_features
