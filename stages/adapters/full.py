"""`full`: every weight of the base is trained, with the scale as a further input; the baseline, for comparison only.

Guided distillation, arXiv 2210.03142. The base itself stays as it is: the trained weights take the place of its own for the time of a
forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.adapters.config import AdapterConfig
from stages.adapters.offset import Offset
from stages.adapters.sites import Shape, layer_beneath
from stages.errors import UserError


class Full(Offset):
    """Offsets tell the network the scale; at a scale of 1 it is the base that runs.

    Attributes:
        weights: the trained parameters by their names in the base, with `/` for the dots.
    """

    variant = "full"

    def __init__(self, config: AdapterConfig, shapes: dict[str, Shape], about: dict[str, Any]) -> None:
        super().__init__(config, shapes, about)
        self._base: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self.unguided: Tensor | None = None
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): torch.empty(shape) for name, shape in about["weights"].items()}
        )

    @classmethod
    def described(cls, about: dict[str, Any], denoiser: nn.Module) -> dict[str, Any]:
        return about | {"weights": shapes_of(denoiser)}

    @torch.no_grad()
    def start_from(self, denoiser: nn.Module) -> None:
        for name, parameter in weights_of(denoiser).items():
            self.weights[name.replace(".", "/")].copy_(parameter)

    def check_fit(self, denoiser: nn.Module) -> None:
        super().check_fit(denoiser)
        found = shapes_of(denoiser)
        for name, shape in self.about["weights"].items():
            if found.get(name) != shape:
                raise UserError(f"the adapter does not fit: {name} is {found.get(name, 'not there')}, not {shape}")

    def before_forward(self, denoiser: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        self.unguided = None
        super().before_forward(denoiser, given)
        if self.prepared is None:
            return None
        if self.guidance is not None and self.guidance.known and self.guidance.mixed:
            prepared, self.prepared = self.prepared, None
            self.unguided = denoiser.forward(**given)[0]
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
            parameters[leaf] = self.weights[name.replace(".", "/")].to(parameter.dtype)


def weights_of(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by their names, whatever LoRA wraps their layers."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in denoiser.named_parameters()
        if ".lora_" not in name
    }


def shapes_of(denoiser: nn.Module) -> dict[str, Shape]:
    return {name: list(parameter.shape) for name, parameter in weights_of(denoiser).items()}


def mixed(guided: Tensor, output: Any, unguided: Tensor) -> Any:
    """A denoiser's output with the unguided samples put in the place of their own."""
    prediction = output[0]
    chosen = torch.where(guided.view(-1, *[1] * (prediction.ndim - 1)), prediction, unguided)
    return (chosen, *output[1:]) if isinstance(output, tuple) else type(output)(chosen)
