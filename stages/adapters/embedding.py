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
from stages.adapters.conditioning import LABEL
from stages.adapters.config import TOKENS, AdapterConfig
from stages.adapters.modulated_low_rank import ModulatedLowRankSite
from stages.adapters.sites import Shape, find_label_embedders
from stages.denoiser import flatten, unflatten
from stages.errors import UserError


class Embedding(GuidanceAdapter):
    """Corrects the prompt's token embeddings as they reach the denoiser; of a class, what its tables give, all alike."""

    variant = "embedding"
    default_sites = ()
    default_conditions = ("pooled",)
    default_rank = 1024

    def new_site(self, width_in: int, width_out: int) -> Site:
        return ModulatedLowRankSite(width_in, width_out, self.config.hidden_size, self.rank)

    @classmethod
    def find(cls, denoiser: nn.Module, config: AdapterConfig, about: dict[str, Any]) -> dict[str, Shape]:
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
