"""Sites: the modules of a denoiser whose output an adapter adds to. One rule finds them in every family."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from stages.errors import UserError

ATTENTION, FEED_FORWARD = "attention", "feed_forward"


def find_sites(denoiser: nn.Module, kinds: list[str]) -> dict[str, int]:
    """Names of the sites of the given kinds, in the order of the denoiser, each with the width of its output.

    A block's attention site is its cross-attention where it has one, else its self-attention (the reference recipe's
    rule); its feed-forward site is its feed-forward network. Of a block for two streams, image and text, it is the
    image's, which every family puts first.
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
            sites[f"{block_name}.{chosen}"] = width_of_attention(attentions[chosen])
        feeding = [n for n, m in block.named_children() if isinstance(m, FeedForward)]
        if FEED_FORWARD in kinds and feeding:
            sites[f"{block_name}.{feeding[0]}"] = width_of_feed_forward(block.get_submodule(feeding[0]))
    if not sites:
        raise UserError(f"{type(denoiser).__name__}: no site of the kinds {', '.join(kinds)} was found in it")
    return sites


def width_of_attention(module: Any) -> int:
    """Width of an attention's output."""
    return module.out_dim if hasattr(module, "out_dim") else module.to_out[0].out_features


def width_of_feed_forward(module: Any) -> int:
    """Width of the last linear layer of a feed-forward network."""
    return [layer for layer in module.net if hasattr(layer, "out_features")][-1].out_features
