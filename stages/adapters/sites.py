"""Sites: the modules whose output an adapter adds to. One structural rule finds them in every family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from stages.errors import UserError

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
# Which of query, key and value a word in a projection's name stands for.
ROLES = {"q": "q", "k": "k", "v": "v", "kv": "kv", "qkv": "qkv", "query": "q", "key": "k", "value": "v"}
ADDED = {"add", "added", "ip"}  # words in the names of projections of a second stream
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Shape = list[int]  # of a site: the widths of its input and output


def find_sites(denoiser: nn.Module, wanted: list[str], seen: Mapping[str, Any] | None = None) -> dict[str, Shape]:
    """Find the requested sites, in the order of the denoiser, each with the widths of its input and output.

    Args:
        wanted: `attention`: each block's cross-attention, or its self-attention if it has none (the reference recipe's
            rule); `feed_forward`: its feed-forward network; or patterns, matched against the names of all attention and
            feed-forward modules. In a block with an image and a text stream it is the image's, which comes first in
            every family. A kind that the denoiser lacks is left out beside one that it has.
        seen: what a trial forward showed of the modules: those that do not run, or whose rows cannot be assigned to
            samples, are left out.

    Raises:
        UserError: a pattern matches nothing, or the denoiser has none of the kinds.
    """
    if not wanted:
        raise UserError(f"adapter.sites: empty: name {ATTENTION}, {FEED_FORWARD} or both")
    every: dict[str, Shape] = {}
    by_kind: dict[str, set[str]] = {ATTENTION: set(), FEED_FORWARD: set()}
    for block in blocks_of(denoiser):
        attentions, feeding = ({n: m for n, m in part.items() if is_usable(n, seen)} for part in block)
        every |= shapes_of(attentions, feeding)
        crossing = [name for name, module in attentions.items() if crosses(name, module, seen)]
        by_kind[ATTENTION] |= set([*crossing, *attentions][:1])
        by_kind[FEED_FORWARD] |= set(list(feeding)[:1])
    matching = {
        pattern: by_kind[pattern] if pattern in by_kind else {name for name in every if fnmatchcase(name, pattern)}
        for pattern in wanted
    }
    some = any(matching.values())
    for pattern in wanted:
        if not matching[pattern] and not (some and pattern in by_kind):
            example = f", e.g. {next(iter(every))}" if every else ""
            raise UserError(
                f"adapter.sites: {pattern}: no site in {type(denoiser).__name__}: name {ATTENTION}, {FEED_FORWARD} or "
                f"a pattern of its {len(every)} attention and feed-forward modules{example}"
            )
    chosen = set().union(*matching.values())
    return {name: shape for name, shape in every.items() if name in chosen}


def every_site(denoiser: nn.Module) -> dict[str, Shape]:
    """Find all attention and feed-forward modules of a denoiser."""
    return {name: shape for block in blocks_of(denoiser) for name, shape in shapes_of(*block).items()}


def shapes_of(attentions: dict[str, nn.Module], feeding: dict[str, nn.Module]) -> dict[str, Shape]:
    of_attention = {name: shape_of_attention(module) for name, module in attentions.items()}
    return of_attention | {name: shape_of_feed_forward(module) for name, module in feeding.items()}


def is_usable(name: str, seen: Mapping[str, Any] | None) -> bool:
    return seen is None or (name in seen and seen[name].spot is not None)


def find_projections(denoiser: nn.Module, wanted: list[str]) -> dict[str, Shape]:
    """Find the linear layers inside the requested sites, each with its shape."""
    found: dict[str, Shape] = {}
    for name in find_sites(denoiser, wanted):
        site = denoiser.get_submodule(name)
        for path, layer in layers_inside(site).items():
            if isinstance(layer, nn.Linear) and not ADDED & name_parts(path):
                found[f"{name}.{path}"] = [layer.in_features, layer.out_features]
    return found


def find_label_embedders(denoiser: nn.Module) -> dict[str, Shape]:
    """Find a denoiser's class embeddings, each with its width."""
    return {
        name: [module.embedding_table.embedding_dim] * 2
        for name, module in denoiser.named_modules()
        if isinstance(module, LabelEmbedding)
    }


def layer_beneath(module: nn.Module) -> Any:
    """Return the base's own layer beneath a LoRA that the user loaded: it stays when the LoRA is unloaded."""
    return getattr(module, "base_layer", module)


# Recognising modules by structure


def blocks_of(denoiser: nn.Module) -> Iterator[tuple[dict[str, nn.Module], dict[str, nn.Module]]]:
    """Yield the attention modules and the feed-forward networks of each block of a denoiser, by name.

    A block is a module with attention among its children; each entry of a list of attention modules is a block.
    """
    for block_name, block in denoiser.named_modules():
        prefix = f"{block_name}." if block_name else ""
        if isinstance(layer_beneath(block), nn.Linear) or is_attention(block):
            continue
        children = {prefix + name: module for name, module in block.named_children()}
        attentions = {name: module for name, module in children.items() if is_attention(module)}
        if isinstance(block, CONTAINERS):
            yield from (({name: module}, {}) for name, module in attentions.items())
        elif attentions:
            others = {name: module for name, module in children.items() if name not in attentions}
            yield attentions, {name: module for name, module in others.items() if is_feed_forward(module)}


def is_attention(module: nn.Module) -> bool:
    """Whether a module has projections to query, key and value among its children, separate or fused."""
    given = {role for name, child in module.named_children() if is_layer(child) for role in roles_of(name)}
    return given == set("qkv")


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module maps a width through two or more layers back to it, without attention or an embedding."""
    layers = list(layers_inside(module).values())
    if len(layers) < 2 or any(is_attention(part) or isinstance(part, nn.Embedding) for part in module.modules()):
        return False
    width = width_in(layers[0])
    return any(width_out(layer) == width for layer in layers[1:])


def crosses(name: str, module: nn.Module, seen: Mapping[str, Any] | None = None) -> bool:
    """Whether keys and values come from other tokens; joint attention, with added projections, does not count."""
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    if any(ADDED & name_parts(child) for child, _ in module.named_children()):
        return False
    named = "cross" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return named or (seen is not None and seen[name].crosses)


def is_layer(module: nn.Module) -> bool:
    return isinstance(layer_beneath(module), (nn.Linear, *CONVOLUTIONS))


def layers_inside(module: nn.Module) -> dict[str, Any]:
    """Return linear and convolutional layers by path, without those of LoRAs and attention processors."""
    inside = {path: layer_beneath(part) for path, part in module.named_modules() if ".lora_" not in f".{path}"}
    return {
        path: part
        for path, part in inside.items()
        if is_layer(part) and not path.endswith(".base_layer") and "processor" not in path.split(".")
    }


def name_parts(path: str) -> set[str]:
    return set(re.split(r"[._]", path.lower()))


def roles_of(name: str) -> str:
    """Return which of query, key and value a projection gives: `to_q`, `wq`, `img_attn_qkv`, `query_key_value`."""
    return "".join(ROLES.get(word) or ROLES.get(word.removeprefix("w"), "") for word in name_parts(name))


def width_in(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def width_out(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def shape_of_attention(module: nn.Module) -> Shape:
    """Output and input are equally wide, because of the residual connection, unless `out_dim` says otherwise."""
    children = {name: layer_beneath(child) for name, child in module.named_children() if is_layer(child)}
    width = width_in(next(layer for name, layer in children.items() if "q" in roles_of(name)))
    return [width, getattr(module, "out_dim", width)]


def shape_of_feed_forward(module: nn.Module) -> Shape:
    return [width_in(next(iter(layers_inside(module).values())))] * 2


def width_axis(shape: Sequence[int], width: int) -> int | None:
    """Return the width's axis in tokens `[n, ..., width]` or `[n, width, ...]`; None if neither fits.

    If both fit, it is the channels of a picture `[n, channels, height, width]`, else the last axis.
    """
    last, first = shape[-1] == width, shape[1] == width
    if last and first:
        return 1 if len(shape) == 4 else len(shape) - 1
    return len(shape) - 1 if last else 1 if first else None
