"""The contract of every variant: where it sits, what it is given, how it is attached, saved and loaded."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.adapters.conditioning import Conditioning
from stages.adapters.one_pass import OnePass
from stages.adapters.sites import ATTENTION, find_sites
from stages.base import first_line
from stages.config import option
from stages.denoiser import bind_inputs, denoiser_of
from stages.errors import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FORMAT_VERSION = 1


@dataclass
class AdapterConfig:
    variant: str = option("modulated_low_rank", "kind of adapter")
    sites: list[str] = option(lambda: [ATTENTION], "kinds of sites: attention, feed_forward")
    hidden_size: int = option(128, "width of the conditioning vector", at_least=1)
    rank: int = option(16, "rank of the low-rank branch (modulated_low_rank)", at_least=1)


class Site(nn.Module, ABC):
    """The adapter's part at one site."""

    @abstractmethod
    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """What is added to the site's output, `[n, length, width]` or broadcastable to it, zero at the start.

        Args:
            tokens: `[n, length, width]`, what the site was given.
            conditioning: `[n, hidden]`, the same for all sites.
        """


class GuidanceAdapter(nn.Module, ABC):
    """A small trained part that makes one conditional pass of a frozen denoiser predict the guided output.

    It rides on forward hooks: no module and no attention processor is replaced, state-dict keys stay as they are. Its
    output is zero at the start, so that attached and untrained it changes nothing, bit for bit. Adapter guidance
    distillation: arXiv 2503.07274.

    Attributes:
        config: the variant and its sizes.
        widths: the sites by name, with the width of each.
        about: what the folder tells besides: conditions, trained scale range, base.
    """

    variant: ClassVar[str]
    variants: ClassVar[dict[str, type[GuidanceAdapter]]] = {}

    def __init_subclass__(cls) -> None:
        GuidanceAdapter.variants[cls.variant] = cls

    def __init__(self, config: AdapterConfig, widths: dict[str, int], about: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.widths, self.about = config, widths, about
        self.conditioning = Conditioning(config.hidden_size, about["conditions"], about["timestep_scale"])
        self.sites = nn.ModuleDict({name.replace(".", "/"): self.new_site(width) for name, width in widths.items()})
        self._handles: list[RemovableHandle] = []
        self._one_pass: OnePass | None = None
        self._scale: Tensor | None = None
        self._bypass = True
        self._vector: Tensor | None = None
        self._gate: Tensor | None = None

    @abstractmethod
    def new_site(self, width: int) -> Site:
        """The part of this variant for a site of that width."""

    @staticmethod
    def create(config: AdapterConfig, widths: dict[str, int], about: dict[str, Any]) -> GuidanceAdapter:
        """A new adapter of the variant that the configuration names."""
        if config.variant not in GuidanceAdapter.variants:
            raise UserError(f"adapter.variant={config.variant}: one of {', '.join(sorted(GuidanceAdapter.variants))}")
        return GuidanceAdapter.variants[config.variant](config, widths, about)

    @staticmethod
    def for_denoiser(config: AdapterConfig, denoiser: nn.Module, about: dict[str, Any]) -> GuidanceAdapter:
        """A new adapter, untrained, for the sites that are found in a denoiser."""
        return GuidanceAdapter.create(config, find_sites(denoiser, list(config.sites)), about)

    # Attaching

    def attach(self, target: Any) -> GuidanceAdapter:
        """Ride on a denoiser, or on a pipeline, whose `guidance_scale` then means this adapter in a single pass.

        Raises:
            UserError: it is attached already, or the base has other sites than the adapter was made for.
        """
        if self._handles:
            raise UserError("this adapter is attached already: detach it first")
        denoiser = target if isinstance(target, nn.Module) else denoiser_of(target)[1]
        modules = self._modules_of(denoiser)
        if denoiser is not target:
            self._one_pass = OnePass(target, self._scale_of_call)
        self._handles.append(denoiser.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for site, module in zip(self.sites.values(), modules, strict=True):
            self._handles.append(module.register_forward_hook(self._hook(site), with_kwargs=True))
        return self

    def detach(self) -> None:
        """Leave the base as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._one_pass is not None:
            self._one_pass.undo()
            self._one_pass = None

    def _modules_of(self, denoiser: nn.Module) -> list[nn.Module]:
        found = find_sites(denoiser, list(self.config.sites))
        for name in [*self.widths, *found]:
            if found.get(name) != self.widths.get(name):
                here, there = self.widths.get(name, "no site"), found.get(name, "no site")
                raise UserError(
                    f"the adapter does not fit this {type(denoiser).__name__}: at {name} it was made for width {here}, "
                    f"the base has {there}: attach it to a base of the architecture it was trained on"
                )
        return [denoiser.get_submodule(name) for name in self.widths]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute once per forward what does not depend on the site."""
        self._vector = None
        if self._scale is None or self._bypass:
            return
        inputs = bind_inputs(module, args, kwargs)
        n = len(next(iter(inputs.values())))
        weight = self.conditioning.scale.frequencies
        scale = self._scale.to(weight.device)
        if n % len(scale):
            raise UserError(
                f"{len(scale)} guidance scales were given for a batch of {n}: one per image, or one for all"
            )
        scale = scale.repeat_interleave(n // len(scale))
        timestep = torch.as_tensor(inputs["timestep"], device=weight.device).expand(n)
        self._vector = self.conditioning(scale, timestep, inputs)
        self._gate = (scale != 1).view(n, 1, 1)

    def _hook(self, site: nn.Module) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._vector is None:
                return None
            tokens = args[0] if args else kwargs["hidden_states"]
            change = site(tokens.to(self._vector.dtype), self._vector) * self._gate
            if isinstance(output, tuple):  # joint attention: the image's tokens come before the text's
                return (output[0] + change.to(output[0].dtype), *output[1:])
            return output + change.to(output.dtype)

        return add

    # The guidance scale

    @contextmanager
    def guidance_scale(self, scale: float | Sequence[float] | Tensor) -> Iterator[None]:
        """Within it, the denoiser guides itself: one scale for all images of a batch, or one per image.

        A scale of 1 is an exact bypass, and so is one below, as in diffusers. A scale outside the trained range warns.
        """
        before = self._scale, self._bypass
        self._scale = torch.as_tensor(scale, dtype=torch.float32).reshape(-1).clamp(min=1)
        # What is on a GPU is a batch in training: looking at its values would make the GPU wait.
        self._bypass = self._scale.device.type == "cpu" and bool((self._scale == 1).all())
        if self._scale.device.type == "cpu":
            self._warn_outside(self._scale)
        try:
            yield
        finally:
            self._scale, self._bypass = before
            self._vector = None

    def _warn_outside(self, scales: Tensor) -> None:
        low, high = self.about["scale_range"]
        outside = scales[(scales != 1) & ((scales < low) | (scales > high))]
        if len(outside):
            warnings.warn(
                f"guidance_scale {outside[0]:g} is outside the range {low:g} to {high:g} that this adapter was trained in",
                stacklevel=4,
            )

    def _scale_of_call(self, scale: float) -> AbstractContextManager[None]:
        """A pipeline's own `guidance_scale`; one that the caller opened around the call comes before it."""
        return self.guidance_scale(scale) if self._scale is None else nullcontext()

    # The folder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        told = {"format_version": FORMAT_VERSION, "adapter": asdict(self.config), "widths": self.widths, **self.about}
        (folder / CONFIG_FILE).write_text(json.dumps(told, indent=2) + "\n")

    @staticmethod
    def from_pretrained(folder: str | Path) -> GuidanceAdapter:
        """The adapter of a folder; nothing in the folder can run code.

        Raises:
            UserError: it is not the folder of an adapter, or of a newer version.
        """
        folder = Path(folder)
        try:
            told = json.loads((folder / CONFIG_FILE).read_bytes())
            if told.pop("format_version") > FORMAT_VERSION:
                raise UserError(f"{folder}: made by a newer version of this project: upgrade it")
            config, widths = AdapterConfig(**told.pop("adapter")), told.pop("widths")
            adapter = GuidanceAdapter.create(config, widths, told)
            adapter.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder}: not the folder of an adapter: {first_line(error)}") from error
        return adapter.eval()
