"""`embedding`: corrects the condition's embedding before the first block, with no site inside the network.

DICE, arXiv 2502.03726, with the scale as a further input. By default the timestep is not among its conditions, and the
correction is the same at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.adapter import GuidanceAdapter
from stages.adapters.conditioning import LABEL, Conditions
from stages.adapters.config import POOLED, TOKENS, AdapterConfig
from stages.adapters.inputs import places_of
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.site import Site, apply_gate, expand_to_rows
from stages.adapters.sites import Shape, find_label_embedders
from stages.adapters.spots import TrialFacts
from stages.base.arguments import argument
from stages.base.denoiser import flatten, unflatten
from stages.errors import UserError


class EmbeddingSite(Site):
    """`O silu(A x * (1 + g(c)) + s(c)) + b(c)`, with O and b initialised to zero."""

    def __init__(self, width: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * rank)
        self.bias = nn.Linear(hidden_size, width)
        for layer in (self.up, self.bias):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.bias.bias)

    def prepare_step(self, conditions: Conditions) -> tuple[Tensor, ...]:
        vector = nn.functional.silu(self.inner(conditions.vector))
        gain, shift = self.modulation(vector)[:, None].chunk(2, dim=-1)
        return 1 + gain, shift, self.bias(vector)[:, None]

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        gain, shift, bias = prepared
        return self.up(nn.functional.silu(self.down(tokens) * gain + shift)) + bias


class Embedding(GuidanceAdapter):
    """Corrects the prompt's token embeddings, or else all class embeddings, or else the pooled embedding."""

    variant = "embedding"
    default_sites = ()
    default_conditions = ("pooled",)
    default_rank = 1024

    def new_site(self, *shape: int) -> Site:
        return EmbeddingSite(shape[0], self.config.hidden_size, self.rank)

    @classmethod
    def candidates(cls, denoiser: nn.Module) -> dict[str, Shape]:
        return {}

    @classmethod
    def find_sites(
        cls,
        denoiser: nn.Module,
        config: AdapterConfig,
        metadata: AdapterMetadata,
        seen: dict[str, TrialFacts] | None = None,
    ) -> dict[str, Shape]:
        """Return the condition to correct, with its width."""
        if config.sites:
            raise UserError("adapter.sites: the variant embedding has no sites: leave it out")
        by_kind = {
            spec["kind"]: {name: [spec["width"]] * 2} for name, spec in metadata.conditions.items() if "width" in spec
        }
        tables = find_label_embedders(denoiser)
        if TOKENS in by_kind:
            return by_kind[TOKENS]
        if tables:
            return {LABEL: next(iter(tables.values()))}
        if POOLED in by_kind:
            return by_kind[POOLED]
        raise UserError(f"{type(denoiser).__name__}: no prompt or class embeddings to correct: use another variant")

    def find_same_sites(self, denoiser: nn.Module) -> dict[str, Shape]:
        return self.find_sites(denoiser, self.config, self.metadata)

    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        def correct(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.prepared is None:
                return None
            return self._corrected(output, slice(None))

        for name in find_label_embedders(denoiser) if LABEL in self.shapes else []:
            yield denoiser.get_submodule(name).register_forward_hook(correct)

    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        super().before_forward(denoiser, given)
        (name,) = self.shapes
        if self.prepared is None or name == LABEL:
            return None
        inputs = flatten(given)
        place = places_of(inputs, next(iter(given)), self.metadata)[name]
        if place.listed:
            entries = enumerate(argument(inputs, name, place))
            changed = {f"{name}.[{i}]": self._corrected(entry[None], slice(i, i + 1))[0] for i, entry in entries}
        else:
            tokens = inputs[name].movedim(place.dim, 0)
            changed = {name: self._corrected(tokens, slice(None)).movedim(0, place.dim)}
        argument_changed = name.partition(".")[0]  # other arguments may hold None, which `flatten` drops
        return given | {argument_changed: unflatten(inputs | changed)[argument_changed]}

    def _corrected(self, tokens: Tensor, samples: slice) -> Tensor:
        """Add the change to embeddings `[rows, ..., width]` of the guided samples."""
        ((name, (width, _)),) = self.shapes.items()
        if tokens.shape[-1] != width:
            raise UserError(f"the adapter was made for {name} of width {width}, and was given {tokens.shape[-1]}")
        assert self.prepared is not None
        (site,) = self.sites.values()
        prepared = (expand_to_rows(each[samples], len(tokens)) for each in self.prepared[0])
        change = site(tokens.to(self.dtype).reshape(len(tokens), -1, width), *prepared).view(tokens.shape)
        gate = None if self.gate is None else self.gate[samples]
        return tokens + apply_gate(change, gate).to(tokens.dtype)
