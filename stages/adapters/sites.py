"""Sites: the modules of a denoiser whose output an adapter adds to. One rule finds them in every family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from stages.errors import UserError

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
# What the words of a projection's name say that it gives: query, key, value.
ROLES = {"q": "q", "k": "k", "v": "v", "kv": "kv", "qkv": "qkv", "query": "q", "key": "k", "value": "v"}
ADDED = {"add", "added", "ip"}  # words in the names of projections of a second stream
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Shape = list[int]  # of a site: the widths of its input and of its output


def find_sites(denoiser: nn.Module, wanted: list[str], seen: Mapping[str, Any] | None = None) -> dict[str, Shape]:
    """Names of the sites that are wanted, in the order of the denoiser, each with the widths of its input and output.

    Args:
        wanted: `attention`: of each block its cross-attention where it has one, else its self-attention (the reference
            recipe's rule); `feed_forward`: its feed-forward network; or patterns, matched against the names of all attention and
            feed-forward modules. Of a block for two streams, image and text, it is the image's, which every family puts first.
            A kind that the denoiser has not is left out beside one that it has.
        seen: what a trial forward showed of them (`spots.TrialFacts`): sites that do not run, or that are not given each sample's
            rows apart, are left out.

    Raises:
        UserError: a pattern that is wanted matches nothing, or none of the kinds does.
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
                f"adapter.sites: {pattern}: no site in {type(denoiser).__name__}: name {ATTENTION}, {FEED_FORWARD} or a "
                f"pattern of its {len(every)} attention and feed-forward modules{example}"
            )
    chosen = set().union(*matching.values())
    return {name: shape for name, shape in every.items() if name in chosen}


def every_site(denoiser: nn.Module) -> dict[str, Shape]:
    """All attention and feed-forward modules of a denoiser."""
    return {name: shape for block in blocks_of(denoiser) for name, shape in shapes_of(*block).items()}


def shapes_of(attentions: dict[str, nn.Module], feeding: dict[str, nn.Module]) -> dict[str, Shape]:
    of_attention = {name: shape_of_attention(module) for name, module in attentions.items()}
    return of_attention | {name: shape_of_feed_forward(module) for name, module in feeding.items()}


def is_usable(name: str, seen: Mapping[str, Any] | None) -> bool:
    return seen is None or (name in seen and seen[name].spot is not None)


def find_projections(denoiser: nn.Module, wanted: list[str]) -> dict[str, Shape]:
    """The linear layers inside the sites that are wanted, each with its shape: where a LoRA sits."""
    found: dict[str, Shape] = {}
    for name in find_sites(denoiser, wanted):
        site = denoiser.get_submodule(name)
        for path, layer in layers_inside(site).items():
            if isinstance(layer, nn.Linear) and not ADDED & name_parts(path):
                found[f"{name}.{path}"] = [layer.in_features, layer.out_features]
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


# What is what, by structure


def blocks_of(denoiser: nn.Module) -> Iterator[tuple[dict[str, nn.Module], dict[str, nn.Module]]]:
    """The attention modules and the feed-forward networks of each block of a denoiser, by name.

    A block is a module with attention among its children; a list of attention modules is as many blocks.
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
    """Whether a module has projections to query, key and value among its children, each its own or several in one layer."""
    given = {role for name, child in module.named_children() if is_layer(child) for role in roles_of(name)}
    return given == set("qkv")


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module leads from a width through two layers or more back to that width, without attention or a table."""
    layers = list(layers_inside(module).values())
    if len(layers) < 2 or any(is_attention(part) or isinstance(part, nn.Embedding) for part in module.modules()):
        return False
    width = width_in(layers[0])
    return any(width_out(layer) == width for layer in layers[1:])


def crosses(name: str, module: nn.Module, seen: Mapping[str, Any] | None = None) -> bool:
    """Whether keys and values come from elsewhere; joint attention has projections of its own for what is added."""
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
    """Linear and convolutional layers by the path in a module, without those of LoRAs and of attention processors."""
    inside = {path: layer_beneath(part) for path, part in module.named_modules() if ".lora_" not in f".{path}"}
    return {
        path: part
        for path, part in inside.items()
        if is_layer(part) and not path.endswith(".base_layer") and "processor" not in path.split(".")
    }


def name_parts(path: str) -> set[str]:
    return set(re.split(r"[._]", path.lower()))


def roles_of(name: str) -> str:
    """Which of query, key and value a projection of this name gives: `to_q`, `wq`, `img_attn_qkv`, `query_key_value`."""
    return "".join(ROLES.get(word) or ROLES.get(word.removeprefix("w"), "") for word in name_parts(name))


def width_in(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def width_out(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def shape_of_attention(module: nn.Module) -> Shape:
    """What it gives is as wide as what it is given, unless it tells otherwise: it stands beside a residual connection."""
    children = {name: layer_beneath(child) for name, child in module.named_children() if is_layer(child)}
    width = width_in(next(layer for name, layer in children.items() if "q" in roles_of(name)))
    return [width, getattr(module, "out_dim", width)]


def shape_of_feed_forward(module: nn.Module) -> Shape:
    return [width_in(next(iter(layers_inside(module).values())))] * 2


def width_axis(shape: Sequence[int], width: int) -> int | None:
    """Which axis of tokens `[n, ..., width]` or `[n, width, ...]` is as wide; None where neither is.

    Of two that are, it is the channels of a picture `[n, width, height, width]`, and else the last.
    """
    last, first = shape[-1] == width, shape[1] == width
    if last and first:
        return 1 if len(shape) == 4 else len(shape) - 1
    return len(shape) - 1 if last else 1 if first else None
