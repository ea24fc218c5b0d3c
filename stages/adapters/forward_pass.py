"""An adapter's forward pass: what it prepares once, and what each site adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.attaching import Attachable
from stages.adapters.conditioning import Conditioning, ScaleAlone
from stages.adapters.guidance import Prepared
from stages.adapters.inputs import samples_of
from stages.adapters.site import Site, add_to_output, apply_gate, expand_to_rows
from stages.adapters.sites import layer_beneath
from stages.adapters.spots import Spot, argument_in
from stages.base.denoiser import flatten
from stages.errors import UserError


class ForwardPass(Attachable):
    """The forward pass of an adapter with sites, the same for most variants."""

    conditioning: Conditioning | ScaleAlone

    def site_hooks(self, denoiser: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook by which each site adds to its module's output."""
        for i, name in enumerate(self.shapes):
            module = layer_beneath(denoiser.get_submodule(name))
            yield module.register_forward_hook(self._output_hook(i, name, module), with_kwargs=True)

    def _output_hook(self, i: int, name: str, module: nn.Module) -> Callable[..., Any]:
        site, shape = self._each_site()[i], self.shapes[name]
        spot, tokens_in = Spot(**self.metadata.spots.get(name, {})), argument_in(module)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.prepared is None:
                return None
            tokens = tokens_in(spot.argument, args, kwargs)
            tokens = tokens.transpose(0, 1) if spot.across else tokens
            prepared = tuple(expand_to_rows(each, len(tokens), spot.tiled) for each in self.prepared[i])
            change = apply_gate(site.change(shape, tokens.to(self.dtype), prepared), self.gate, spot.tiled)
            return add_to_output(output, change.transpose(0, 1) if spot.across else change, spot.output)

        return add

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the sites compute."""
        return next((parameter.dtype for parameter in self.sites.parameters()), torch.float32)

    # A forward pass

    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        """Compute once what does not depend on the image; return changed arguments, or None."""
        self.prepared = self.gate = None
        guidance = self.guidance
        if guidance is None or guidance.bypass:
            return None
        wanted = bool(self.config.conditions)
        samples = samples_of(flatten(given), next(iter(given)), self.metadata, wanted)
        if samples.ragged and guidance.is_readable and not guidance.is_uniform:
            raise UserError(
                "guidance_scale: the images have scales of their own and prompts of different lengths: "
                "give the images one by one"
            )
        self.move_to(samples.device)
        guidance.to(samples.device)
        scale = guidance.at(guidance.row(samples.timestep), samples.count)
        self.gate = scale != 1 if guidance.mixed else None
        self.prepared = self._prepare(scale, samples.timestep, samples.conditions | guidance.negative)
        return None

    def after_forward(self, denoiser: nn.Module, output: Any) -> Any:
        """Drop the prepared tensors, except in training: checkpointed blocks run again in the backward pass."""
        if not torch.is_grad_enabled():
            self.prepared = self.gate = None
        return None

    def _prepare(self, scale: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Prepared:
        embedded = self.conditioning.embed(inputs)
        conditions = self.conditioning(self.scale_with_gain(scale), timestep, embedded).to(self.dtype)
        return [(*site.prepare_step(conditions), *site.prepare_tokens(conditions)) for site in self._each_site()]

    def scale_with_gain(self, scale: Tensor, gain: float | None = None) -> Tensor:
        """Apply a guidance gain, by default the adapter's own, but never push a scale past the trained maximum."""
        gain, most = self.metadata.guidance_gain if gain is None else gain, self.metadata.scale_range[1]
        return torch.minimum(scale + (gain - 1) * (scale - 1), scale.clamp(min=most))

    def _each_site(self) -> list[Site]:
        return [site for site in self.sites.values() if isinstance(site, Site)]
