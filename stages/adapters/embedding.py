"""`embedding`: the condition's embedding is corrected before the first block; nothing sits inside the network.

DICE, arXiv 2502.03726, with the scale as a further input. Without the timestep among its conditions (the default) the correction
is the same at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.adapter import GuidanceAdapter, Site
from stages.adapters.conditioning import LABEL, Known
from stages.adapters.config import TOKENS, AdapterConfig
from stages.adapters.layers import Inputs
from stages.adapters.sites import Shape, find_label_embedders
from stages.denoiser import flatten, unflatten
from stages.errors import UserError


class EmbeddingSite(Site):
    """`O silu(A x * (1 + g(c)) + s(c)) + b(c)`, with O and b zero at the start."""

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

    def of_step(self, known: Known) -> tuple[Tensor, ...]:
        vector = nn.functional.silu(self.inner(known.vector))
        gain, shift = self.modulation(vector)[:, None].chunk(2, dim=-1)
        return 1 + gain, shift, self.bias(vector)[:, None]

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        gain, shift, bias = prepared
        return self.up(nn.functional.silu(self.down(tokens) * gain + shift)) + bias


class Embedding(GuidanceAdapter):
    """Corrects the prompt's token embeddings as they reach the denoiser; of a class, what its tables give, all alike."""

    variant = "embedding"
    default_sites = ()
    default_conditions = ("pooled",)
    default_rank = 1024

    def new_site(self, *shape: int) -> Site:
        return EmbeddingSite(shape[0], self.config.hidden_size, self.rank)

    @classmethod
    def find(
        cls, denoiser: nn.Module, config: AdapterConfig, about: dict[str, Any], inputs: Inputs | None = None
    ) -> dict[str, Shape]:
        """The condition that is corrected, with its width."""
        if config.sites:
            raise UserError("adapter.sites: the variant embedding sits at no site: leave it out")
        tokens = {name: [told["width"]] * 2 for name, told in about["conditions"].items() if told["kind"] == TOKENS}
        if tokens:
            return tokens
        tables = find_label_embedders(denoiser)
        if not tables:
            raise UserError(
                f"{type(denoiser).__name__}: neither token embeddings nor a table of classes to correct: take another variant"
            )
        return {LABEL: next(iter(tables.values()))}

    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        (site,) = self.sites.values()

        def correct(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.prepared is None:
                return None
            return self.added(output, site(output.to(self.dtype)[:, None], *self.prepared[0])[:, 0])

        for name in find_label_embedders(denoiser) if LABEL in self.shapes else []:
            yield denoiser.get_submodule(name).register_forward_hook(correct)

    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        super().before_forward(denoiser, given)
        ((name, (width, _)),) = self.shapes.items()
        if self.prepared is None or name == LABEL:
            return None
        inputs = flatten(given)
        tokens = inputs[name]
        if tokens.shape[-1] != width:
            raise UserError(f"the adapter was made for {name} of width {width}, and was given {tokens.shape[-1]}")
        (site,) = self.sites.values()
        inputs[name] = self.added(tokens, site(tokens.to(self.dtype), *self.prepared[0]))
        return unflatten(inputs)
