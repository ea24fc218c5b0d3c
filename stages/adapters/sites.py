"""Sites: the modules of a denoiser whose output an adapter adds to. One rule finds them in every family."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from stages.errors import UserError

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

Shape = list[int]  # of a site: the widths of its input and of its output


def find_sites(denoiser: nn.Module, wanted: list[str]) -> dict[str, Shape]:
    """Names of the sites that are wanted, in the order of the denoiser, each with the widths of its input and output.

    Args:
        wanted: `attention`: of each block its cross-attention where it has one, else its self-attention (the reference
            recipe's rule); `feed_forward`: its feed-forward network; or patterns, matched against the names of all attention and
            feed-forward modules. Of a block for two streams, image and text, it is the image's, which every family puts first.

    Raises:
        UserError: something that is wanted matches nothing.
    """
    if not wanted:
        raise UserError(f"adapter.sites: empty: name {ATTENTION}, {FEED_FORWARD} or both")
    every: dict[str, Shape] = {}
    by_kind: dict[str, set[str]] = {ATTENTION: set(), FEED_FORWARD: set()}
    for block_name, block in denoiser.named_modules():
        prefix = f"{block_name}." if block_name else ""
        attentions = {
            prefix + n: m for n, m in block.named_children() if isinstance(m, (Attention, AttentionModuleMixin))
        }
        feeding = {prefix + n: m for n, m in block.named_children() if isinstance(m, FeedForward)}
        every |= {name: shape_of_attention(module) for name, module in attentions.items()}
        every |= {name: shape_of_feed_forward(module) for name, module in feeding.items()}
        crossing = [name for name, module in attentions.items() if getattr(module, "is_cross_attention", False)]
        by_kind[ATTENTION] |= set([*crossing, *attentions][:1])
        by_kind[FEED_FORWARD] |= set(list(feeding)[:1])
    chosen: set[str] = set()
    for pattern in wanted:
        matching = by_kind.get(pattern) or {name for name in every if fnmatchcase(name, pattern)}
        if not matching:
            example = f", e.g. {next(iter(every))}" if every else ""
            raise UserError(
                f"adapter.sites: {pattern}: no site in {type(denoiser).__name__}: name {ATTENTION}, {FEED_FORWARD} or a "
                f"pattern of its {len(every)} attention and feed-forward modules{example}"
            )
        chosen |= matching
    return {name: shape for name, shape in every.items() if name in chosen}


def find_projections(denoiser: nn.Module, wanted: list[str]) -> dict[str, Shape]:
    """The linear layers inside the sites that are wanted, each with its shape: where a LoRA sits."""
    found: dict[str, Shape] = {}
    for name in find_sites(denoiser, wanted):
        site = denoiser.get_submodule(name)
        inside = {n.removesuffix(".base_layer"): m for n, m in site.named_modules() if ".lora_" not in n}
        names = inside if isinstance(site, FeedForward) else [n for n in PROJECTIONS if n in inside]
        layers = {n: layer_beneath(inside[n]) for n in names}
        found |= {f"{name}.{n}": [m.in_features, m.out_features] for n, m in layers.items() if isinstance(m, nn.Linear)}
    return found


def find_label_embedders(denoiser: nn.Module) -> dict[str, Shape]:
    """The tables of classes inside a denoiser, each with its width."""
    return {
        name: [module.embedding_table.embedding_dim] * 2
        for name, module in denoiser.named_modules()
        if isinstance(module, LabelEmbedding)
    }


def layer_beneath(module: nn.Module) -> Any:
    """The base's own layer where a LoRA that the user loaded wraps it: that one stays when the LoRA goes."""
    return getattr(module, "base_layer", module)


def shape_of_attention(module: Any) -> Shape:
    width = module.out_dim if hasattr(module, "out_dim") else module.to_out[0].out_features
    return [getattr(module, "query_dim", width), width]


def shape_of_feed_forward(module: Any) -> Shape:
    layers = [layer for layer in module.modules() if hasattr(layer, "in_features")]
    return [layers[0].in_features, layers[-1].out_features]
