"""`full`: trains every weight of the base, with the scale as a further input; a baseline for comparison.

Guided distillation, arXiv 2210.03142. The base itself does not change: a forward pass swaps the trained weights in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.config import AdapterConfig
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.offset import Offset
from stages.adapters.site import expand_to_rows
from stages.adapters.sites import Shape, layer_beneath
from stages.adapters.trial_inputs import map_tensors
from stages.errors import UserError


class Full(Offset):
    """Offsets give the network the scale; at a scale of 1 the base runs.

    Attributes:
        weights: the trained parameters by their names in the base, with `/` for the dots.
    """

    variant = "full"
    default_learning_rate = 3e-4
    exclusive = True

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], metadata: AdapterMetadata) -> None:
        super().__init__(config, shapes, metadata)
        self._base: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self.unguided: Any = None
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): torch.empty(shape) for name, shape in metadata.weights.items()}
        )

    @classmethod
    def with_base_metadata(cls, metadata: AdapterMetadata, denoiser: nn.Module) -> AdapterMetadata:
        return replace(metadata, weights=shapes_of(denoiser))

    @torch.no_grad()
    def init_from_base(self, denoiser: nn.Module) -> None:
        for name, parameter in weights_of(denoiser).items():
            self.weights[name.replace(".", "/")].copy_(parameter)

    def check_fit(self, denoiser: nn.Module) -> None:
        super().check_fit(denoiser)
        found = shapes_of(denoiser)
        for name, shape in self.metadata.weights.items():
            if found.get(name) != shape:
                raise UserError(f"the adapter does not fit: {name} is {found.get(name, 'missing')}, not {shape}")

    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        self.unguided = None
        super().before_forward(denoiser, given)
        if self.prepared is None:
            return None
        if self.guidance is not None and self.guidance.is_readable and self.guidance.mixed:
            prepared, self.prepared = self.prepared, None
            own = map_tensors(Tensor.clone, given)  # some denoisers change their arguments in place
            self.unguided = denoiser.forward(**own)
            self.prepared = prepared
        self._swap(denoiser)
        return None

    def after_forward(self, denoiser: nn.Module, output: Any) -> Any:
        for parameters, name, parameter in self._base:
            parameters[name] = parameter
        self._base.clear()
        if self.unguided is not None and self.gate is not None and output is not None:
            output = mixed(self.gate, output, self.unguided)
        super().after_forward(denoiser, output)
        return output

    def _swap(self, denoiser: nn.Module) -> None:
        for name, parameter in weights_of(denoiser).items():
            path, _, leaf = name.rpartition(".")
            parameters = layer_beneath(denoiser.get_submodule(path))._parameters
            self._base.append((parameters, leaf, parameter))
            weight = self.weights[name.replace(".", "/")].to(parameter.dtype)
            # A convolution's kernel goes by it.
            parameters[leaf] = weight if torch.is_grad_enabled() else weight.detach()


def weights_of(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters by name, also beneath a loaded LoRA."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in denoiser.named_parameters()
        if ".lora_" not in name
    }


def shapes_of(denoiser: nn.Module) -> dict[str, Shape]:
    return {name: list(parameter.shape) for name, parameter in weights_of(denoiser).items()}


def mixed(guided: Tensor, output: Any, unguided: Any) -> Any:
    """Take unguided samples of a nested output from the unguided one."""
    if isinstance(output, dict):  # a diffusers output class is one too
        return type(output)(**{name: mixed(guided, value, unguided[name]) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        of_samples = len(output) == len(guided) and isinstance(output, list)
        each = guided.unbind(0) if of_samples else [guided] * len(output)
        return type(output)(mixed(*entry) for entry in zip(each, output, unguided, strict=True))
    if not isinstance(output, Tensor):
        return output
    rows = expand_to_rows(guided, len(output)) if guided.ndim else guided
    return torch.where(rows.view(-1, *[1] * (output.ndim - 1)) if guided.ndim else rows, output, unguided)
