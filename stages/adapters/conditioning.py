"""An adapter's conditioning on guidance scale, timestep and conditions: what it sees besides a site's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from stages.adapters.config import NEGATIVE_TOKENS, POOLED, TIMESTEP, TOKENS
from stages.adapters.inputs import is_mask
from stages.base.denoiser import NEGATIVE
from stages.errors import UserError

FREQUENCIES = 64
FURTHEST = 2.0  # times the highest trained guidance, up to which the curves of the scale go on
LABEL, MEAN = "label", "mean"
SMALLEST_EMBEDDING = 16  # narrower tensors are image sizes or crops
FEWEST_TOKENS = 5  # shorter tensors are hardly prompts: coordinates on three axes, a token for a length


class ScaleEmbedding(nn.Module):
    """Embeds guidance scales `[n]` as vectors `[n, hidden]`, through Fourier features of log w.

    The random frequencies (arXiv 2006.10739) are a buffer that is saved with the weights. The features include log w
    itself.
    """

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(FREQUENCIES))
        self.project = TimestepEmbedding(2 * FREQUENCIES + 1, hidden_size)

    def forward(self, guidance_scale: Tensor) -> Tensor:
        log_scale = guidance_scale.float().log()[:, None]
        angles = 2 * math.pi * log_scale * self.frequencies
        return self.project(torch.cat([log_scale, angles.cos(), angles.sin()], dim=1))


def scale_curves(guidance_scale: Tensor, most: float = math.inf) -> Tensor:
    """Return `w - 1`, `log w` and `1 - 1/w` `[n, 3]` of scales w `[n]`: all are 0 at 1, and smooth beyond.

    Args:
        most: the highest trained scale. Above it the curves are straight lines, because guidance is linear in w; at
            `FURTHEST` times its guidance, `w - 1`, they end, and stay what they are there.
    """
    w = guidance_scale.float().clamp(max=1 + FURTHEST * (most - 1))
    edge = w.clamp(max=most)
    curves = torch.stack([edge - 1, edge.log(), 1 - 1 / edge], 1)
    slopes = torch.stack([torch.ones_like(edge), 1 / edge, 1 / edge.square()], 1)
    return curves + (w - edge)[:, None] * slopes


def find_conditions(tensors: dict[str, dict[str, Any]], num_classes: int) -> dict[str, dict[str, Any]]:
    """Find what an adapter can be conditioned on in a record, by dtype and shape.

    Args:
        tensors: dtype and shape of the conditional inputs by the denoiser's own names.
        num_classes: rows of a class embedding; with one class there is nothing to distinguish.

    Returns:
        By name, a class (`{"class_labels": {"kind": "label", "classes": 10}}`), the widest pooled embedding, and the
        widest token embeddings, positive and negative, each with its kind and width. Short sequences and several
        embeddings per token, `[length, several, width]` or `[several, length, width]`, are used only if there is
        nothing else.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, spec in tensors.items():
        if spec["shape"] == [] and "int" in spec["dtype"] and num_classes > 1 and not found:
            found[name] = {"kind": LABEL, "classes": num_classes}
    for kind, ranks, negative in ((POOLED, (1,), False), (TOKENS, (2, 3), False), (NEGATIVE_TOKENS, (2, 3), True)):
        fitting = {
            name: (kind == POOLED or spec["shape"][0] >= FEWEST_TOKENS, -len(spec["shape"]), spec["shape"][-1])
            for name, spec in tensors.items()
            if len(spec["shape"]) in ranks and "float" in spec["dtype"] and spec["shape"][-1] >= SMALLEST_EMBEDDING
            and name.startswith(NEGATIVE) == negative and "mask" not in name
        }  # fmt: skip
        if fitting:
            name = max(fitting, key=lambda name: fitting[name])
            found[name] = {"kind": kind, "width": fitting[name][-1]}
    return found


def choose_conditions(found: dict[str, dict[str, Any]], wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Choose the requested conditions among those that `find_conditions` found.

    `pooled` is a class if there is one, else a pooled embedding, else the mean of the tokens.

    Raises:
        UserError: a requested condition is unknown, or the records hold no negative tokens.
    """
    if unknown := set(wanted) - {TIMESTEP, POOLED, TOKENS, NEGATIVE_TOKENS}:
        known = f"{TIMESTEP}, {POOLED}, {TOKENS}, {NEGATIVE_TOKENS}"
        raise UserError(f"adapter.conditions: unknown {sorted(unknown)[0]}: any of {known}")
    by_kind = {spec["kind"]: (name, spec) for name, spec in found.items()}
    chosen = [by_kind[kind] for kind in (TOKENS, NEGATIVE_TOKENS) if kind in wanted and kind in by_kind]
    if NEGATIVE_TOKENS in wanted and NEGATIVE_TOKENS not in by_kind:
        raise UserError(
            "adapter.conditions: negative_tokens: the records hold none: generate from prompts with a column "
            "negative_prompt"
        )
    if POOLED in wanted:
        whole = by_kind.get(LABEL) or by_kind.get(POOLED)
        if whole is None and TOKENS in by_kind and TOKENS not in wanted:
            name, spec = by_kind[TOKENS]
            whole = name, spec | {"kind": MEAN}
        chosen = [whole, *chosen] if whole else chosen
    return dict(chosen)


class ConditionEmbedding(nn.Module):
    """Embeds one condition: a class by a table, an embedding by a projection."""

    def __init__(self, metadata: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.kind = metadata["kind"]
        if self.kind == LABEL:
            self.project: nn.Module = nn.Embedding(metadata["classes"], hidden_size)
        else:
            self.project = nn.Sequential(nn.LayerNorm(metadata["width"]), nn.Linear(metadata["width"], hidden_size))

    def forward(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a vector `[n, hidden]` for the condition; for tokens also one for each, `[n, length, hidden]`.

        Args:
            value: `[n]` classes, `[n, width]` pooled or `[n, length, width]` token embeddings.
            mask: `[n, length]`, which tokens count; None if all do.
        """
        if self.kind == LABEL:
            return self.project(value), None
        value = value.to(self.project[1].weight.dtype)  # type: ignore[index]
        if self.kind == POOLED:
            return self.project(value), None
        if self.kind == MEAN:
            return self.project(mean_of_tokens(value, mask)), None
        tokens = self.project(value)
        return mean_of_tokens(tokens, mask), tokens


def mean_of_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the masked mean `[n, width]` of tokens `[n, length, width]`."""
    if mask is None:
        return tokens.mean(1)
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass
class Conditions:
    """The conditions of a forward pass, the same for every site.

    Attributes:
        curves: `[n, 3]`, of `scale_curves`.
        vector: `[n, hidden]`, all conditions in one vector.
        parts: `[n, k, hidden]`, one token each for scale, timestep and every condition.
        tokens: `[n, length, hidden]`, of token conditions; mask: `[n, length]`, which of them count.
    """

    curves: Tensor
    vector: Tensor
    parts: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Conditions:
        tokens = None if self.tokens is None else self.tokens.to(dtype)
        return Conditions(self.curves.to(dtype), self.vector.to(dtype), self.parts.to(dtype), tokens, self.mask)


@dataclass
class EmbeddedConditions:
    """Embedded conditions: one vector for each `[n, c, hidden]`, and their tokens and mask."""

    wholes: Tensor
    tokens: Tensor | None
    mask: Tensor | None


class Conditioning(nn.Module):
    """Embeds scale, timestep and conditions once per forward pass, for every site.

    Args:
        hidden_size: width of the vectors.
        conditions: of `choose_conditions`, by the denoiser's argument names.
        timestep_scale, timestep_offset: the denoiser's timestep is `scale * t + offset` of the scheduler's t.
        sees_timestep: whether the adapter sees the timestep.
        most: the highest trained scale, as which higher ones are embedded; their curves go on (`scale_curves`).
    """

    def __init__(
        self,
        hidden_size: int,
        conditions: dict[str, dict[str, Any]],
        timestep_scale: float,
        sees_timestep: bool = True,
        timestep_offset: float = 0.0,
        most: float = math.inf,
    ) -> None:
        super().__init__()
        self.most = most
        self.timestep_scale, self.timestep_offset = timestep_scale, timestep_offset
        self.scale = ScaleEmbedding(hidden_size)
        self.timestep_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep = TimestepEmbedding(256, hidden_size) if sees_timestep else None
        self.names = list(conditions)
        self.conditions = nn.ModuleList(ConditionEmbedding(metadata, hidden_size) for metadata in conditions.values())

    def embed(self, inputs: dict[str, Any]) -> EmbeddedConditions:
        """Embed the conditions, which do not depend on the step, from the denoiser's flat arguments.

        Raises:
            UserError: a trained condition is missing.
        """
        wholes, tokens, masks = [], [], []
        for name, embedding in zip(self.names, self.conditions, strict=True):
            if name not in inputs:
                raise UserError(f"the adapter was trained with {name}, and this call of the denoiser has none")
            value, mask = inputs[name], None
            if value.ndim > 2:
                value, mask = as_tokens(value, mask_of(name, inputs))
            whole, each = embedding(value, mask)
            wholes.append(whole)
            if each is not None:
                tokens.append(each)
                masks.append(mask)
        return EmbeddedConditions(
            torch.stack(wholes, 1) if wholes else self.scale.frequencies.new_zeros(1, 0, 0),
            torch.cat(tokens, 1) if tokens else None,
            joined(masks, tokens),
        )

    def forward(self, guidance_scale: Tensor, timestep: Tensor, embedded: EmbeddedConditions) -> Conditions:
        """
        Args:
            guidance_scale, timestep: `[n]`, the timestep in the denoiser's counting.
            embedded: the conditions of n samples.
        """
        parts = [self.scale(guidance_scale.clamp(max=self.most))]
        if self.timestep is not None:
            counted = (timestep.float() - self.timestep_offset) / self.timestep_scale
            parts.append(self.timestep(self.timestep_features(counted)))
        together = torch.stack(parts, 1)
        if embedded.wholes.shape[1]:
            together = torch.cat([together, embedded.wholes], 1)
        vector = nn.functional.silu(together.sum(1))
        curves = scale_curves(guidance_scale, self.most)
        return Conditions(curves, vector, together, embedded.tokens, embedded.mask)


class ScaleAlone(nn.Module):
    """Represents the scale by its curves only; it has no parameters.

    Args:
        most: the highest trained scale.
    """

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.most = most

    def embed(self, inputs: dict[str, Any]) -> EmbeddedConditions:
        return EmbeddedConditions(torch.zeros(1, 0, 0), None, None)

    def forward(self, guidance_scale: Tensor, timestep: Tensor, embedded: EmbeddedConditions) -> Conditions:
        curves = scale_curves(guidance_scale, self.most)
        return Conditions(curves, curves, curves[:, None])


def joined(masks: list[Tensor | None], tokens: list[Tensor]) -> Tensor | None:
    """Concatenate the masks of several token conditions; None if every token counts."""
    if all(mask is None for mask in masks):
        return None
    whole = [
        torch.ones(each.shape[:2], dtype=torch.bool, device=each.device) if mask is None else mask.bool()
        for mask, each in zip(masks, tokens, strict=True)
    ]
    return torch.cat(whole, 1)


def mask_of(name: str, inputs: dict[str, Any]) -> Tensor | None:
    """Find the mask `[n, length]` of token embeddings `[n, length, ...]` by its shape.

    If several masks fit, token embeddings of that length are matched to them in the order of the arguments.
    """
    shape, negative = inputs[name].shape[:2], name.startswith(NEGATIVE)
    candidates = {
        key: value for key, value in inputs.items()
        if isinstance(value, Tensor) and key.startswith(NEGATIVE) == negative and value.shape[:2] == shape
    }  # fmt: skip
    masks = [value for key, value in candidates.items() if is_mask(key, value)]
    tokens = [key for key, value in candidates.items() if value.ndim > 2 and value.is_floating_point()]
    own = tokens.index(name) if len(tokens) == len(masks) else 0
    return masks[own] if masks else None


def as_tokens(value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Reshape embeddings `[n, length, kinds, width]` to `[n, length * kinds, width]`, with their mask."""
    if value.ndim == 3:
        return value, mask
    kinds = value.shape[2:-1].numel()
    return value.flatten(1, -2), None if mask is None else mask.repeat_interleave(kinds, 1)
